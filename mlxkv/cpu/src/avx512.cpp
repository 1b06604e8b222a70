#if defined(__x86_64__)
#include <immintrin.h>
#define NS avx512
#define NAME "avx512"
#define TGT \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define VW 16
#include "kernels.inc"
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#define NS avx2
#define NAME "avx2"
#define TGT __attribute__((target("avx2,fma,f16c")))
#define VW 8
#include "kernels.inc"
#endif

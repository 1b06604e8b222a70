#include "kernels.h"

#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Compiled for each instruction set of the architecture, in one library; chosen at run time.
#define NS baseline
#define NAME "baseline"
#define TGT
#define VW 4
#include "kernels.inc"
#if defined(__x86_64__)
#undef NS
#undef NAME
#undef TGT
#undef VW
#define NS avx2
#define NAME "avx2"
#define TGT __attribute__((target("avx2,fma,f16c")))
#define VW 8
#include "kernels.inc"
#undef NS
#undef NAME
#undef TGT
#undef VW
#define NS avx512
#define NAME "avx512"
#define TGT \
  __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#define VW 16
#include "kernels.inc"
#endif

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (!name || !std::strcmp(name, "avx512"))) return &avx512::table;
  if (has_avx2 && (!name || !std::strcmp(name, "avx2"))) return &avx2::table;
#endif
  return !name || !std::strcmp(name, "baseline") ? &baseline::table : nullptr;
}

// What every machine of the architecture has, and the choice of one at run time.
#define NS baseline
#define NAME "baseline"
#define TGT
#define VW 4
#include "kernels.inc"

#include <cstring>

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace amx {
const Kernels* kernels();  // null where there is no AMX
}
#endif

const Kernels* kernels(const char* name) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (!name || !std::strcmp(name, "amx")))
    if (const Kernels* found = amx::kernels()) return found;
  if (has_avx512 && (!name || !std::strcmp(name, "avx512"))) return &avx512::table;
  if (has_avx2 && (!name || !std::strcmp(name, "avx2"))) return &avx2::table;
#endif
  return !name || !std::strcmp(name, "baseline") ? &baseline::table : nullptr;
}

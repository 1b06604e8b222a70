// The kernel that rounds to affine formats, of each instruction set. Plain data: no MLX here.
#pragma once

#include <cstring>

#include "kernels.h"

// Values of a group that is quantized, at most.
constexpr int MOST_OF_GROUP = 128;

// Values in groups, what is made of them, and where it is written: see `quantize.h`.
struct Rounded {
  const void* x;
  Scale kind;  // of the values: F32, BF16 or F16
  size_t n_groups;
  int group, bits;
  uint8_t* codes;
  float *scales, *biases;
};
using Quantizer = void (*)(const Rounded&);

namespace baseline {
extern const Quantizer quantizer;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Quantizer quantizer;
}
namespace avx512 {
extern const Quantizer quantizer;
}
#endif

// That of the instruction set of some kernels, or of the widest that they imply.
inline Quantizer quantizer_of(const Kernels& kernels) {
#if defined(__x86_64__)
  if (std::strcmp(kernels.name, "baseline"))
    return std::strcmp(kernels.name, "avx2") ? avx512::quantizer : avx2::quantizer;
#endif
  return baseline::quantizer;
}

// Rounding values to MLX's affine format.
#pragma once

#include "op.h"

// x [..., K] in groups, as `mx.quantize` rounds it: codes [..., K bits / 32], and scales and biases
// [..., K / group] in x's dtype. Values are finite. On the default stream of the CPU.
Arrays quantize(const mx::array& x, int group, int bits);

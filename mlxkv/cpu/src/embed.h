// Rows of packed weights as floats.
#pragma once

#include "products.h"

// Rows `ids` [...] of affine weights [N, K]: code * scale + bias, each rounded: [..., K]. A row that
// there is not is the nearest.
mx::array embed(const mx::array& ids, const Weights&, int K);

// Products of rows with weights: `linear`, and `experts`, where each row has its own weight.
#pragma once

#include "low_rank.h"

// Weights [N, K] or [E, N, K] as MLX packs them, with what belongs to them.
struct Weights {
  const mx::array& w;
  const Maybe &scales, &biases;  // biases left out: -2^(bits-1) scale
  Kind kind;
  int group;
  const Maybe& bias;  // [N] or [E, N], float32
};

// With an activation a weight has the gate's rows and then the up projection's.
struct Activation {
  Act act;
  float alpha, limit;
};

// act(rms_norm(x) W^T + b) + residual of x [..., K]; the norm's weight may be left out. Changes are
// of what the activation takes.
mx::array linear(const mx::array& x, const Weights&, const Maybe& norm, float eps,
                 const Maybe& residual, Activation, const MaybeLow& = {});

// act(x W_e^T + b_e) for the k experts [..., k] of each row: [..., k, N].
// x is [..., K], a row for all its experts, or [..., k, K].
mx::array experts(const mx::array& x, const Weights&, const mx::array& chosen, Activation);

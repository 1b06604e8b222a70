// What a layer does to one token of each sequence, in one operation: a step of decoding has many
// layers, and each operation costs time of the host.
#pragma once

#include "attention.h"
#include "products.h"

// Where a token's KV is written, how many keys it sees, and the first of them: of each row. No starts
// are those of the buffers.
struct Places {
  std::vector<int> columns, lengths, starts;
};

// Attention of heads [B, 1, (H + 2 Hk) D], turned as by `rotate`, whose keys and values are written
// into buffers [B, Hk, S, D], or [1, Hk, S, D] if all are of one sequence: the result [B, 1, H D],
// and the two buffers.
Arrays attend_step(const mx::array& qkv, const mx::array& frequencies, const mx::array& k,
                   const mx::array& v, const Rotation&, const Maybe& q_norm, const Maybe& k_norm,
                   float eps, const Places&, const Softmax&);

// down(act(norm(x) W^T + b)) + residual of up to MOST_ROWS rows; `up` as for `linear`.
mx::array gated_mlp(const mx::array& x, const Weights& up, const Maybe& norm, float eps,
                    const Weights& down, const Maybe& residual, Activation,
                    const MaybeLow& of_up = {}, const MaybeLow& of_down = {});

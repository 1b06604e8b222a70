// The other operations of a layer: norms, rotary embeddings, attention.
#pragma once

#include "op.h"

// Rows of x [..., K] divided by their root mean square, times w [K], plus a residual.
mx::array rms_norm(const mx::array& x, const Maybe& w, float eps, const Maybe& residual);

// Heads of queries, keys and values [B, L, (H + 2 Hk) D] -> [B, H + 2 Hk, L, D]: queries and keys
// normed where there are weights [D], and rotated by their positions.
struct Rotation {
  int n_heads, n_kv_heads;
  std::vector<int> offsets;  // of each row of the batch, or one for all
  float factor;              // on what is rotated
};
mx::array rotate(const mx::array& qkv, const mx::array& frequencies, const Rotation&,
                 const Maybe& q_norm, const Maybe& k_norm, float eps);

// KV as codes [B, Hk, S, words] with scales and biases [B, Hk, S, groups].
struct CodedKV {
  const mx::array &codes, &scales, &biases;
  int bits, group, dim;
};
struct Softmax {
  float scale, cap;  // cap 0: none
  bool causal;
  const Maybe &mask, &sinks;  // [L, S] or [B, 1, 1, S]; [H]
};

// softmax(scale q k^T) v of q [B, H, L, D]: [B, L, H V], heads side by side.
mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const Softmax&);
mx::array attend(const mx::array& q, const CodedKV& k, const CodedKV& v, const Softmax&);

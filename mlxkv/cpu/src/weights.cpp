// Weights of products: their numbers, and where their values lie.
#include "products.h"

namespace {

Scale scale_of(const mx::array& scales, Kind kind) {
  if (scales.dtype() == mx::float32) return Scale::F32;
  if (scales.dtype() == mx::bfloat16) return Scale::BF16;
  if (scales.dtype() == mx::float16) return Scale::F16;
  require(scales.dtype() == mx::uint8, "scales of that dtype are not known");
  return kind == Kind::FP4 ? Scale::E4M3 : Scale::E8M0;
}

// The numbers of a weight: where its values lie is known when it is computed.
Weight shape_of(const Weights& weights, int K) {
  Weight p{};
  p.kind = weights.kind;
  p.group = weights.group;
  p.K = K;
  p.N = weights.w.shape(-2);
  require(K % 32 == 0 && K > 0, "rows are no multiple of 32 values");
  if (!is_packed(p.kind)) return p;
  require(weights.scales.has_value(), "packed weights have scales");
  require(int64_t(K) * bits_of(p.kind) == int64_t(weights.w.shape(-1)) * 32, "codes of other rows");
  require(p.group >= 16 && K % p.group == 0, "groups do not divide rows");
  require(K / p.group <= MOST_GROUPS, "rows have too many groups");
  p.scale = scale_of(*weights.scales, p.kind);
  // mxfp4 has groups of 32 with powers of two, nvfp4 of 16 with floats.
  if (p.kind == Kind::FP4 && p.group == 32) p.scale = Scale::E8M0;
  return p;
}

// Sets where the values of one expert lie, and takes the arrays that were used off `in`.
struct Located {
  Weight weight;
  const float* bias;
};
Located locate(Weight p, const Arrays& in, size_t& at, bool has_biases, bool has_bias, int expert) {
  const auto& w = in[at++];
  const size_t bytes_of_rows = size_t(p.N) * p.K * bits_of(p.kind) / 8;
  p.w = reinterpret_cast<const uint32_t*>(w.data<char>() + expert * bytes_of_rows);
  if (is_packed(p.kind)) {
    const auto& scales = in[at++];
    const size_t bytes = size_t(p.N) * p.n_groups() * scales.itemsize() * expert;
    p.scales = scales.data<char>() + bytes;
    if (has_biases) p.biases = in[at++].data<char>() + bytes;
  }
  const float* bias = has_bias ? floats_of(in[at++]) + size_t(expert) * p.N : nullptr;
  return {p, bias};
}

void add_weights(Inputs& in, const Weights& weights) {
  in.arrays.push_back(weights.w);
  in.add(weights.scales);
  in.add(weights.biases);
  require(!weights.bias || weights.bias->dtype() == mx::float32, "a bias is not float32");
  in.add(weights.bias);
}

}  // namespace

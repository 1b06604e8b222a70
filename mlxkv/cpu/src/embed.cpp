// Behind products.cpp in one unit, of whose parts this is made.
#include "embed.h"

namespace {

constexpr int ROWS_OF_PIECE = 16;

float number_of(const void* numbers, Scale kind, size_t at) {
  float one[16];
  in_use().numbers(numbers, kind, at, 1, one);
  return one[0];
}

// A row of codes of up to 8 bits, which lie one behind the other.
void embed_row(const Weight& p, int row, float* out) {
  const int bits = bits_of(p.kind), n_groups = p.n_groups();
  const auto* codes = reinterpret_cast<const uint8_t*>(p.w) + size_t(row) * p.K * bits / 8;
  for (int g = 0; g < n_groups; ++g) {
    const float scale = number_of(p.scales, p.scale, size_t(row) * n_groups + g);
    const float bias = number_of(p.biases, p.scale, size_t(row) * n_groups + g);
    for (int i = g * p.group; i < (g + 1) * p.group; ++i) {
      const int bit = i * bits;
      unsigned some = codes[bit / 8];
      if (bit % 8 + bits > 8) some |= unsigned(codes[bit / 8 + 1]) << 8;
      const float product = float(some >> bit % 8 & ((1u << bits) - 1)) * scale;
      out[i] = product + bias;
    }
  }
}

}  // namespace

mx::array embed(const mx::array& ids, const Weights& weights, int K) {
  const Weight shape = shape_of(weights, K);
  require(shape.kind < Kind::FP4 && weights.biases.has_value(), "rows are not affine");
  require(ids.dtype() == mx::uint32 || ids.dtype() == mx::int32, "ids are not 32-bit integers");
  auto out_shape = ids.shape();
  out_shape.push_back(K);
  Inputs in({ids});
  add_weights(in, weights);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_ids;
    size_t at = 1;
    const Weight p = locate(shape, in, at, true, false, 0).weight;
    const int32_t* ids = dense_of<int32_t>(in[0], of_ids);
    const int n = int(in[0].size());
    float* rows = floats_of(out);
    Pool::get().run((n + ROWS_OF_PIECE - 1) / ROWS_OF_PIECE, [&](int piece) {
      const int stop = std::min(n, (piece + 1) * ROWS_OF_PIECE);
      for (int i = piece * ROWS_OF_PIECE; i < stop; ++i)
        embed_row(p, std::clamp(ids[i], 0, p.N - 1), rows + size_t(i) * K);
    });
  };
  return operation("MlxkvEmbed", out_shape, {double(shape.kind), double(shape.group)}, run,
                   in.arrays);
}

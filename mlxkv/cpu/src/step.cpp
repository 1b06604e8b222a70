// Behind attention.cpp and products.cpp in one unit, of whose parts these operations are made.
#include "step.h"

namespace {

// Heads of rows, and where their KV lies: each row is the next token of a sequence of its own, or all
// are the next tokens of one, whose buffers are those of a single row.
struct Step {
  Sizes sizes;
  bool is_one;
  Rotation rotation;
  Places places;
  float eps;
  bool is_normed;
  int half;

  // A row's place in the buffers.
  int of(int b) const { return is_one ? 0 : b; }
  int start(int b) const { return places.starts.empty() ? 0 : places.starts[b]; }
  Op::Numbers numbers() const {
    Op::Numbers found{double(rotation.n_heads), double(rotation.n_kv_heads), rotation.factor, eps,
                      double(is_normed)};
    for (auto* of : {&rotation.offsets, &places.columns, &places.lengths, &places.starts})
      found.insert(found.end(), of->begin(), of->end());
    return found;
  }
  // Heads [first, last) of each sequence, `in` being heads, frequencies and norms from `at` on.
  template <class To>
  void turn(const Arrays& in, size_t at, int first, int last, const To& to) const {
    static thread_local Scratch of_x;
    const float* x = dense(in[at], of_x);
    const Turning turning{rotation, floats_of(in[at + 1]), is_normed ? floats_of(in[at + 2]) : nullptr,
                          is_normed ? floats_of(in[at + 3]) : nullptr, eps, half, sizes.D};
    for (int b = 0; b < sizes.B; ++b)
      turning.row(x + size_t(b) * turning.n_heads() * sizes.D, rotation.offsets[b], first, last,
                  [&](int h) { return to(b, h - first); });
  }
};

void check_step(const Step& step, const mx::array& qkv, const mx::array& k, const mx::array& v) {
  const auto& s = step.sizes;
  check(s, qkv);
  require(s.D * (s.H + 2 * s.Hk) == qkv.shape(2) && 2 * step.half <= s.D, "heads of another size");
  for (auto* buffer : {&k, &v})
    require_floats(*buffer, {step.is_one ? 1 : s.B, s.Hk, s.S, s.D}, "KV of another shape");
  const auto& [columns, lengths, starts] = step.places;
  require(starts.empty() || int(starts.size()) == s.B, "positions of other rows");
  for (auto* of : {&columns, &lengths, &step.rotation.offsets})
    require(int(of->size()) == s.B, "positions of other rows");
  for (int b = 0; b < s.B; ++b)
    require(columns[b] >= 0 && columns[b] < s.S && lengths[b] > 0 && lengths[b] <= s.S &&
                step.start(b) >= 0 && step.start(b) <= s.S - lengths[b],
            "positions past the buffers");
}

// A buffer of keys or of values with those of the step.
mx::array written(const Step& step, bool is_keys, const mx::array& buffer, const Arrays& heads) {
  auto run = [=](const Arrays& in, mx::array& out) {
    const int first = step.sizes.H + (is_keys ? 0 : step.sizes.Hk);
    float* to = floats_of(out);
    step.turn(in, 1, first, first + step.sizes.Hk, [&](int b, int h) {
      return to + step.of(b) * out.strides(0) + h * out.strides(1) + step.places.columns[b] * out.strides(2);
    });
  };
  auto numbers = step.numbers();
  numbers.push_back(is_keys);
  Arrays in{buffer};
  in.insert(in.end(), heads.begin(), heads.end());
  return update("MlxkvWrite", numbers, run, in);
}

}  // namespace

Arrays attend_step(const mx::array& qkv, const mx::array& frequencies, const mx::array& k,
                   const mx::array& v, const Rotation& rotation, const Maybe& q_norm,
                   const Maybe& k_norm, float eps, const Places& places, const Softmax& softmax) {
  require(qkv.ndim() == 3 && qkv.shape(1) == 1 && k.ndim() == 4, "heads are not [B, 1, N]");
  const int H = rotation.n_heads, Hk = rotation.n_kv_heads, D = k.shape(3);
  const Step step{{qkv.shape(0), H, Hk, 1, k.shape(2), D, D}, k.shape(0) == 1, rotation, places, eps,
                  q_norm.has_value(), int(frequencies.size())};
  check_step(step, qkv, k, v);
  require(!softmax.mask, "a step has no mask");
  check_mask(softmax, step.sizes);
  Inputs of_heads({qkv, frequencies});
  of_heads.add(q_norm);
  of_heads.add(k_norm);
  const auto keys = written(step, true, k, of_heads.arrays);
  const auto values = written(step, false, v, of_heads.arrays);
  Inputs in(of_heads.arrays);
  in.arrays.insert(in.arrays.begin(), {keys, values});
  in.add(softmax.sinks);
  const bool has_sinks = softmax.sinks.has_value();
  const Heads heads = heads_of(step.sizes, softmax);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_q;
    const auto& s = step.sizes;
    float* q = of_q.floats(size_t(s.B) * H * D);
    auto query = [&](int b, int h) { return q + (size_t(b) * H + h * s.shared()) * D; };
    step.turn(in, 2, 0, H, [&](int b, int h) { return q + (size_t(b) * H + h) * D; });
    const View K(in[0], of_q), V(in[1], of_q);  // which lie densely: they are not copied
    Heads a = heads;
    a.q_head = D, a.k_row = K.strides[2], a.v_row = V.strides[2];
    auto rows = [&](int b, int h, int, int, Heads&) {
      const int of = step.of(b), start = step.start(b);
      return std::pair(K.head(of, h) + start * K.strides[2], V.head(of, h) + start * V.strides[2]);
    };
    attend_ones(s, a, step.places.lengths, query, rows,
                has_sinks ? floats_of(in.back()) : nullptr, floats_of(out));
  };
  auto numbers = step.numbers();
  for (double n : numbers_of(softmax)) numbers.push_back(n);
  return {operation("MlxkvAttendStep", {step.sizes.B, 1, H * D}, numbers, run, in.arrays), keys,
          values};
}

mx::array gated_mlp(const mx::array& x, const Weights& up, const Maybe& norm, float eps,
                    const Weights& down, const Maybe& residual, Activation activation,
                    const MaybeLow& of_up, const MaybeLow& of_down) {
  require(x.dtype() == mx::float32 && x.ndim() >= 2, "x is no rows of float32");
  const int K = x.shape(-1), n = int(x.size() / K);
  require(activation.act != Act::NONE && n <= MOST_ROWS, "many rows are products of their own");
  const Weight up_shape = shape_of(up, K), down_shape = shape_of(down, up_shape.N / 2);
  auto out_shape = x.shape();
  out_shape.back() = down_shape.N;
  require_floats(norm, {K}, "a norm's scale is not float32 of x's length");
  require_floats(residual, out_shape, "what is added is not float32 of the result's shape");
  const bool up_biases = up.biases.has_value(), up_bias = up.bias.has_value();
  const bool down_biases = down.biases.has_value(), down_bias = down.bias.has_value();
  const bool is_normed = eps >= 0, has_norm = norm.has_value(), has_residual = residual.has_value();
  Inputs in({x});
  add_weights(in, up);
  add_weights(in, down);
  in.add(norm);
  in.add(residual);
  const auto up_changes = low_rank_shape(of_up, K, up_shape.N, n, in);
  const auto down_changes = low_rank_shape(of_down, down_shape.K, down_shape.N, n, in);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x, of_residual, of_between;
    size_t at = 1;
    const auto first = locate(up_shape, in, at, up_biases, up_bias, 0);
    const auto second = locate(down_shape, in, at, down_biases, down_bias, 0);
    if (!n) return;
    Job job{};
    job.n_rows = n;
    job.groups = {{first.weight, first.bias, 0, n}};
    job.x = dense(in[0], of_x);
    job.K = K;
    job.out_dim = down_shape.K;
    job.is_normed = is_normed;
    job.norm = has_norm ? floats_of(in[at++]) : nullptr;
    job.eps = eps;
    const float* added = has_residual ? dense(in[at++], of_residual) : nullptr;
    job.activation = activation;
    job.out = of_between.floats(size_t(n) * down_shape.K);
    compute(job, up_changes, in, at);
    Job last{};
    last.n_rows = n;
    last.groups = {{second.weight, second.bias, 0, n}};
    last.x = job.out;
    last.K = down_shape.K;
    last.out_dim = down_shape.N;
    last.residual = added;
    last.out = floats_of(out);
    compute(last, down_changes, in, at);
  };
  Op::Numbers numbers{double(up_shape.kind), double(up_shape.group), double(down_shape.kind),
                      double(down_shape.group), double(up_biases), double(up_bias),
                      double(down_biases), double(down_bias), double(has_norm), eps,
                      double(has_residual), double(activation.act), activation.alpha,
                      activation.limit};
  for (auto* changes : {&up_changes, &down_changes})
    if (*changes) (*changes)->add_to(numbers);
  return operation("MlxkvGatedMLP", out_shape, numbers, run, in.arrays);
}

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pool.h"

namespace {

// Queries of a chunk that are a piece of work, and floats of one of an elementwise operation.
constexpr int QUERIES = 32, ELEMENTS = 16384;

// Angles of one position, or of some: cosines and sines of each pair.
class Angles {
 public:
  void set(const float* frequencies, int half, float at, float factor) {
    // Each layer of a step asks for the same position.
    if (frequencies == frequencies_ && at == at_ && factor == factor_ && half == half_) return;
    frequencies_ = frequencies, at_ = at, factor_ = factor, half_ = half;
    for (int j = 0; j < half; ++j) {
      c[j] = std::cos(at * frequencies[j]) * factor;
      s[j] = std::sin(at * frequencies[j]) * factor;
    }
  }
  float c[LONGEST_HEAD / 2], s[LONGEST_HEAD / 2];

 private:
  const float* frequencies_ = nullptr;
  float at_ = 0, factor_ = 0;
  int half_ = 0;
};

// Queries and keys of a row of heads: normed, where there are weights, and rotated.
struct Turning {
  const Rotation& rotation;
  const float *frequencies, *q_norm, *k_norm;
  float eps;
  int half, D;

  int n_heads() const { return rotation.n_heads + 2 * rotation.n_kv_heads; }
  // Heads [first, last) of x, of position `at`; `to(h)` says where head h of all is written.
  template <class To>
  void row(const float* x, int at, int first, int last, const To& to) const {
    static thread_local Angles angles;
    float normed[LONGEST_HEAD];
    angles.set(frequencies, half, float(at), rotation.factor);
    const int H = rotation.n_heads, n_turned = H + rotation.n_kv_heads;
    for (int h = first; h < last; ++h) {
      const float* from = x + size_t(h) * D;
      if (h >= n_turned) {
        std::memcpy(to(h), from, sizeof(float) * D);
        continue;
      }
      if (q_norm) {
        in_use().rms(from, h < H ? q_norm : k_norm, eps, D, normed);
        from = normed;
      }
      in_use().rotate(from, angles.c, angles.s, half, D, to(h));
    }
  }
};

// An array whose last axis is dense: as it lies, or a copy.
struct View {
  const float* values;
  int64_t strides[3];

  View(const mx::array& x, Scratch& scratch) {
    if (x.strides(-1) == 1 || x.shape(-1) == 1) {
      values = floats_of(x);
      for (int i = 0; i < 3; ++i) strides[i] = x.strides(i);
      return;
    }
    values = dense(x, scratch);
    strides[2] = x.shape(3);
    strides[1] = strides[2] * x.shape(2);
    strides[0] = strides[1] * x.shape(1);
  }
  const float* head(int b, int h) const { return values + b * strides[0] + h * strides[1]; }
};

// What a softmax needs of its arrays when it runs.
struct Masked {
  bool has_mask, has_sinks;

  // Sets the mask of one sequence: [L, S], or [B, 1, 1, S] for one query of each.
  void set(Heads& a, const Arrays& in, size_t at, int b) const {
    if (!has_mask) return;
    const auto& mask = in[at];
    a.mask = mask.data<bool>() + (mask.ndim() == 4 ? b * mask.strides(0) : 0);
    a.mask_row = mask.strides(-2);
  }
  const float* sinks(const Arrays& in, size_t at, int head) const {
    return has_sinks ? floats_of(in[at + has_mask]) + head : nullptr;
  }
};

struct Sizes {
  int B, H, Hk, L, S, D, V;
  int shared() const { return H / Hk; }
};

void check(const Sizes& s, const mx::array& q) {
  require(q.dtype() == mx::float32, "queries are not float32");
  require(s.Hk > 0 && s.H % s.Hk == 0 && s.shared() <= MOST_SHARED, "too many heads share a KV head");
  require(s.D % 16 == 0 && s.V % 16 == 0 && s.D <= LONGEST_HEAD && s.V <= LONGEST_HEAD,
          "heads of that size are not known");
}

void check_mask(const Softmax& softmax, const Sizes& s) {
  if (softmax.sinks) require(softmax.sinks->dtype() == mx::float32, "sinks are not float32");
  if (!softmax.mask) return;
  const auto& mask = *softmax.mask;
  require(mask.dtype() == mx::bool_ && mask.shape(-1) == s.S, "a mask is bool, one for each key");
  require(mask.ndim() == 2 ? mask.shape(0) == s.L : mask.ndim() == 4 && s.L == 1,
          "a mask is [L, S], or [B, 1, 1, S] for one query");
}

Heads heads_of(const Sizes& s, const Softmax& softmax) {
  Heads a{};
  a.G = s.shared(), a.D = s.D, a.V = s.V, a.L = s.L, a.S = s.S;
  a.scale = softmax.scale, a.cap = softmax.cap, a.causal = softmax.causal;
  a.o_row = size_t(s.H) * s.V;
  return a;
}

// Merges the pieces of one query's heads: each has weighted values, maxima and sums.
void merge(const Sizes& s, const float* parts, int n, const float* sinks, float* out) {
  const int G = s.shared(), one = G * (s.V + 2);
  for (int g = 0; g < G; ++g) {
    float top = sinks ? sinks[g] : -1e30f;
    for (int c = 0; c < n; ++c) top = std::max(top, parts[size_t(c) * one + G * s.V + g]);
    float sum = sinks ? std::exp(sinks[g] - top) : 0.0f;
    float* o = out + size_t(g) * s.V;
    std::memset(o, 0, sizeof(float) * s.V);
    for (int c = 0; c < n; ++c) {
      const float* p = parts + size_t(c) * one;
      const float f = std::exp(p[G * s.V + g] - top);
      sum += f * p[G * s.V + G + g];
      for (int d = 0; d < s.V; ++d) o[d] += f * p[size_t(g) * s.V + d];
    }
    for (int d = 0; d < s.V; ++d) o[d] /= sum;
  }
}

// Attention of one query of each sequence, of which `lengths` says how many keys it sees;
// `query(b, h)` gives the queries of a KV head, and `keys` is as for `run_attention`.
template <class Query, class Keys>
void attend_ones(const Sizes& s, const Heads& a, const std::vector<int>& lengths, const Query& query,
                 const Keys& keys, const float* sinks, float* out) {
  const int G = s.shared(), one = G * (s.V + 2);
  struct Piece {
    int b, h, first;
  };
  std::vector<Piece> pieces;
  for (int b = 0; b < s.B; ++b)
    for (int h = 0; h < s.Hk; ++h)
      for (int first = 0; first < lengths[b]; first += KEYS) pieces.push_back({b, h, first});
  static thread_local Scratch kept;
  float* parts = kept.floats(pieces.size() * one);
  Pool::get().run(int(pieces.size()), [&](int i) {
    const auto [b, h, first] = pieces[i];
    const int last = std::min(lengths[b], first + KEYS);
    Heads own = a;
    auto [k, v] = keys(b, h, first, last, own);
    float* p = parts + size_t(i) * one;
    in_use().attend_one(own, query(b, h), k, v, first, last, p, p + G * s.V, p + G * s.V + G);
  });
  for (int b = 0; b < s.B; ++b) {
    const int n = (lengths[b] + KEYS - 1) / KEYS;
    for (int h = 0; h < s.Hk; ++h, parts += size_t(n) * one)
      merge(s, parts, n, sinks ? sinks + h * G : nullptr, out + (size_t(b) * s.H + h * G) * s.V);
  }
}

// Runs attention; `keys(b, h, first, last, heads)` gives pointers at key 0 of a head of which the
// keys [first, last) can be read, and sets their strides.
template <class Keys>
void run_attention(const Arrays& in, mx::array& out_, const Sizes& s, Heads a, const Masked& masked,
                   size_t behind_kv, const Keys& keys) {
  static thread_local Scratch of_q;
  const View q(in[0], of_q);
  const int G = s.shared(), n_heads = s.B * s.Hk;
  a.q_head = q.strides[1], a.q_row = q.strides[2];
  float* out = floats_of(out_);
  if (s.L == 1) {
    auto masked_keys = [&](int b, int h, int first, int last, Heads& own) {
      masked.set(own, in, behind_kv, b);
      return keys(b, h, first, last, own);
    };
    attend_ones(s, a, std::vector<int>(s.B, s.S), [&](int b, int h) { return q.head(b, h * G); },
                masked_keys, masked.sinks(in, behind_kv, 0), out);
    return;
  }
  const int n = (s.L + QUERIES - 1) / QUERIES;
  Pool::get().run(n_heads * n, [&](int i) {
    // The last queries of a chunk see the most: first.
    const int c = n - 1 - i / n_heads, b = i % n_heads / s.Hk, h = i % n_heads % s.Hk;
    const int first = c * QUERIES, last = std::min(s.L, first + QUERIES);
    Heads own = a;
    masked.set(own, in, behind_kv, b);
    auto [k, v] = keys(b, h, 0, own.causal ? s.S - s.L + last : s.S, own);
    static thread_local Scratch local;
    float* o = out + (size_t(b) * s.L * s.H + size_t(h) * G) * s.V;
    in_use().attend_chunk(own, q.head(b, h * G), k, v, masked.sinks(in, behind_kv, h * G), first, last, o,
                          local.floats(chunk_floats(own, last - first)));
  });
}

Masked masked_of(const Softmax& softmax, Inputs& in) {
  in.add(softmax.mask);
  in.add(softmax.sinks);
  return {softmax.mask.has_value(), softmax.sinks.has_value()};
}

Op::Numbers numbers_of(const Softmax& softmax) {
  return {softmax.scale, softmax.cap, double(softmax.causal), double(softmax.mask.has_value()),
          double(softmax.sinks.has_value())};
}

Codes codes_of(const mx::array& codes, const mx::array& scales, const mx::array& biases, int bits,
               int group, int dim, int b, int h) {
  Codes c{};
  const size_t at = b * scales.strides(0) + h * scales.strides(1);
  c.codes = codes.data<uint32_t>() + b * codes.strides(0) + h * codes.strides(1);
  c.scale = scales.dtype() == mx::float32    ? Scale::F32
            : scales.dtype() == mx::bfloat16 ? Scale::BF16
                                             : Scale::F16;
  c.scales = scales.data<char>() + at * scales.itemsize();
  c.biases = biases.data<char>() + (b * biases.strides(0) + h * biases.strides(1)) * scales.itemsize();
  c.bits = bits, c.group = group, c.dim = dim;
  c.code_row = codes.strides(2), c.scale_row = scales.strides(2);
  return c;
}

void check(const CodedKV& kv) {
  require(kv.bits == 4 || kv.bits == 8, "codes have 4 or 8 bits");
  require(kv.group % 16 == 0 && kv.group >= 32, "groups of codes have 32 values or more");
  require(kv.scales.dtype() == kv.biases.dtype() && mx::issubdtype(kv.scales.dtype(), mx::floating),
          "scales and biases are floats");
}

}  // namespace

mx::array rms_norm(const mx::array& x, const Maybe& w, float eps, const Maybe& residual) {
  require(x.dtype() == mx::float32, "x is not float32");
  const int dim = x.shape(-1);
  require_floats(w, {dim}, "a norm's scale is not float32 of x's length");
  require_floats(residual, x.shape(), "what is added is not float32 of x's shape");
  const bool has_weight = w.has_value(), has_residual = residual.has_value();
  Inputs in({x});
  in.add(w);
  in.add(residual);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x, of_residual;
    const int n_rows = int(in[0].size() / dim), step = std::max(1, ELEMENTS / dim);
    const float* x = dense(in[0], of_x);
    const float* w = has_weight ? floats_of(in[1]) : nullptr;
    const float* r = has_residual ? dense(in[1 + has_weight], of_residual) : nullptr;
    float* o = floats_of(out);
    Pool::get().run((n_rows + step - 1) / step, [&](int i) {
      for (int m = i * step; m < std::min(n_rows, (i + 1) * step); ++m) {
        float* row = o + size_t(m) * dim;
        in_use().rms(x + size_t(m) * dim, w, eps, dim, row);
        if (!r) continue;
        for (int c = 0; c < dim; ++c) row[c] += r[size_t(m) * dim + c];
      }
    });
  };
  return operation("MlxkvRMSNorm", x.shape(), {eps, double(has_weight), double(has_residual)}, run,
                   in.arrays);
}

mx::array rotate(const mx::array& qkv, const mx::array& frequencies, const Rotation& rotation,
                 const Maybe& q_norm, const Maybe& k_norm, float eps) {
  require(qkv.dtype() == mx::float32 && qkv.ndim() == 3, "heads are not float32 [B, L, N]");
  const int H = rotation.n_heads, Hk = rotation.n_kv_heads, heads = H + 2 * Hk;
  const int B = qkv.shape(0), L = qkv.shape(1), D = qkv.shape(2) / heads, half = frequencies.size();
  require(D * heads == qkv.shape(2) && 2 * half <= D && D <= LONGEST_HEAD, "heads of another size");
  require(rotation.offsets.size() == 1 || int(rotation.offsets.size()) == B, "offsets of other rows");
  const bool normed = q_norm.has_value();
  Inputs in({qkv, frequencies});
  in.add(q_norm);
  in.add(k_norm);
  Op::Numbers numbers{double(H), double(Hk), rotation.factor, eps, double(normed)};
  numbers.insert(numbers.end(), rotation.offsets.begin(), rotation.offsets.end());
  auto run = [=](const Arrays& in, mx::array& out_) {
    static thread_local Scratch of_x;
    const float *x = dense(in[0], of_x), *f = floats_of(in[1]);
    float* out = floats_of(out_);
    const int step = L == 1 ? 1 : 8, per = (L + step - 1) / step;
    const Turning turning{rotation, f, normed ? floats_of(in[2]) : nullptr,
                          normed ? floats_of(in[3]) : nullptr, eps, half, D};
    auto some = [&](int i) {
      const int b = i / per, l0 = i % per * step;
      const int at = rotation.offsets[rotation.offsets.size() == 1 ? 0 : b];
      for (int l = l0; l < std::min(L, l0 + step); ++l)
        turning.row(x + (size_t(b) * L + l) * heads * D, at + l, 0, heads,
                    [&](int h) { return out + ((size_t(b) * heads + h) * L + l) * D; });
    };
    if (L == 1 && B * heads * D < ELEMENTS)
      for (int i = 0; i < B; ++i) some(i);
    else
      Pool::get().run(B * per, some);
  };
  return operation("MlxkvRotate", {B, heads, L, D}, numbers, run, in.arrays);
}

mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v,
                 const Softmax& softmax) {
  const Sizes s{q.shape(0), q.shape(1), k.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3)};
  check(s, q);
  check_mask(softmax, s);
  require(k.dtype() == mx::float32 && v.dtype() == mx::float32, "KV is not float32");
  require(k.shape(3) == s.D && v.shape(1) == s.Hk && v.shape(2) == s.S, "keys and values differ");
  Inputs in({q, k, v});
  const Masked masked = masked_of(softmax, in);
  const Heads heads = heads_of(s, softmax);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_k, of_v;
    const View k(in[1], of_k), v(in[2], of_v);
    Heads a = heads;
    a.k_row = k.strides[2], a.v_row = v.strides[2];
    auto keys = [&](int b, int h, int, int, Heads&) {
      return std::pair(k.head(b, h), v.head(b, h));
    };
    run_attention(in, out, s, a, masked, 3, keys);
  };
  return operation("MlxkvAttend", {s.B, s.L, s.H * s.V}, numbers_of(softmax), run, in.arrays);
}

mx::array attend(const mx::array& q, const CodedKV& k, const CodedKV& v, const Softmax& softmax) {
  const Sizes s{q.shape(0),       q.shape(1),  k.codes.shape(1), q.shape(2),
                k.codes.shape(2), q.shape(3), v.dim};
  check(s, q);
  check(k);
  check(v);
  check_mask(softmax, s);
  require(k.dim == s.D, "keys of another size");
  Inputs in({q, k.codes, k.scales, k.biases, v.codes, v.scales, v.biases});
  const Masked masked = masked_of(softmax, in);
  const Heads heads = heads_of(s, softmax);
  struct Kind {
    int bits, group, dim;
  };
  const Kind of_k{k.bits, k.group, k.dim}, of_v{v.bits, v.group, v.dim};
  auto run = [=](const Arrays& in, mx::array& out) {
    auto keys = [&](int b, int h, int first, int last, Heads& a) {
      static thread_local Scratch of_keys, of_values;
      a.k_row = s.D, a.v_row = s.V;
      const int n = last - first;
      float* K = of_keys.floats(size_t(n) * s.D);
      float* V = of_values.floats(size_t(n) * s.V);
      const auto codes = [&](int at, const Kind& kind) {
        return codes_of(in[at], in[at + 1], in[at + 2], kind.bits, kind.group, kind.dim, b, h);
      };
      in_use().unpack(codes(1, of_k), first, n, K, s.D);
      in_use().unpack(codes(4, of_v), first, n, V, s.V);
      return std::pair(static_cast<const float*>(K) - int64_t(first) * s.D,
                       static_cast<const float*>(V) - int64_t(first) * s.V);
    };
    run_attention(in, out, s, heads, masked, 7, keys);
  };
  auto numbers = numbers_of(softmax);
  for (int n : {k.bits, k.group, v.bits, v.group}) numbers.push_back(n);
  return operation("MlxkvAttendCodes", {s.B, s.L, s.H * s.V}, numbers, run, in.arrays);
}

// The kernels of each instruction set that this machine has, on memory of exactly the sizes that
// they are told: for sanitizers. Results are compared with the baseline's.
#include "kernels.h"
#include "rounding.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace {

using Floats = std::vector<float>;
unsigned seed = 1;

float random_float() { return float(rand_r(&seed) % 2001) / 1000.0f - 1.0f; }
Floats random_floats(size_t n) {
  Floats found(n);
  for (auto& x : found) x = random_float();
  return found;
}

struct Stored {
  Weight weight{};
  std::unique_ptr<uint32_t[]> words;
  std::unique_ptr<uint8_t[]> scales;
  Floats biases;

  Stored(Kind kind, Scale scale, int N, int K, int group, bool biased) {
    weight.kind = kind, weight.scale = scale, weight.N = N, weight.K = K, weight.group = group;
    const size_t n_words = size_t(N) * size_t(K) * size_t(bits_of(kind)) / 32;
    words.reset(new uint32_t[n_words]);
    for (size_t i = 0; i < n_words; ++i) {
      // Dense values of some size; 8-bit floats that are no NaN.
      const uint32_t bits = uint32_t(rand_r(&seed)) ^ uint32_t(rand_r(&seed)) << 16;
      const float value = random_float();
      if (kind == Kind::F32) std::memcpy(&words[i], &value, 4);
      else if (kind == Kind::BF16) words[i] = 0x3f80'3f80u ^ (bits & 0x807f'807fu);
      else if (kind == Kind::F16) words[i] = 0x3c00'3c00u ^ (bits & 0x83ff'83ffu);
      else words[i] = kind == Kind::FP8 ? bits & 0xbfbf'bfbfu : bits;
    }
    weight.w = words.get();
    const int n = N * weight.n_groups();
    const size_t size = scale == Scale::F32 ? 4 : scale == Scale::F16 || scale == Scale::BF16 ? 2 : 1;
    scales.reset(new uint8_t[size_t(n) * size + 1]);
    for (int i = 0; i < n; ++i) {
      const float value = 0.01f * (1.5f + random_float());
      const uint16_t half = scale == Scale::F16 ? 0x2000 : 0x3c00;
      if (size == 4) std::memcpy(&scales[size_t(i) * 4], &value, 4);
      else if (size == 2) std::memcpy(&scales[size_t(i) * 2], &half, 2);
      else scales[size_t(i)] = scale == Scale::E8M0 ? 120 : 0x28;
    }
    weight.scales = n ? scales.get() : nullptr;
    if (biased && scale == Scale::F32) {
      biases = random_floats(size_t(n));
      weight.biases = biases.data();
    }
  }
};

// Results [M, N] of a few rows, and of many.
Floats few(const Kernels& k, const Weight& p, const Floats& x, int M) {
  const size_t length = size_t(k.length(p)), n_sums = size_t(padded(p.n_groups()));
  const int ldo = padded(p.N);
  Floats prepared(size_t(M) * length), sums(size_t(M) * n_sums);
  for (int m = 0; m < M; ++m) {
    k.prepare(p, x.data() + m * p.K, m, M, prepared.data());
    if (n_sums) k.group_sums(p, x.data() + m * p.K, sums.data() + size_t(m) * n_sums);
  }
  Floats out(size_t(M) * size_t(ldo));
  k.rows(p, prepared.data(), sums.data(), M, 0, p.N, out.data(), ldo);
  return out;
}

Floats many(const Kernels& k, const Weight& p, const Floats& x, int M) {
  const size_t length = size_t(k.length(p)), n_sums = size_t(padded(p.n_groups()));
  Floats tiles(size_t(M) * length), sums(size_t(M) * n_sums), scratch(static_cast<size_t>(MANY_FLOATS));
  for (int i = 0; i < M; i += 16) {
    const float* rows[16];
    const int start = i / TOKENS * TOKENS, width = std::min(TOKENS, M - start);
    for (int j = 0; j < 16; ++j) {
      rows[j] = x.data() + (i + j) * p.K;
      if (n_sums) k.group_sums(p, rows[j], sums.data() + size_t(i + j) * n_sums);
    }
    k.prepare_tile(p, rows, i - start, width, tiles.data() + size_t(start) * length);
  }
  Floats out(size_t(M) * size_t(p.N)), panel(size_t(M) * PANEL);
  for (int first = 0; first < p.N; first += PANEL) {
    const int R = std::min(PANEL, p.N - first);
    k.many(p, tiles.data(), sums.data(), M, first, R, panel.data(), scratch.data());
    for (int m = 0; m < M; ++m)
      std::copy_n(panel.data() + m * PANEL, R, out.data() + m * p.N + first);
  }
  return out;
}

bool agree(const char* what, const Kernels& k, const Weight& p, const Floats& a, const Floats& b) {
  double size = 0, difference = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    size += double(b[i]) * double(b[i]);
    difference = std::max(difference, std::fabs(double(a[i]) - double(b[i])));
  }
  if (difference <= 1e-5 * std::sqrt(size / double(a.size())) + 1e-30) return true;
  std::fprintf(stderr, "%s %s: kind %d, [%d, %d] of groups of %d differ by %g\n", k.name, what,
               int(p.kind), p.N, p.K, p.group, difference);
  return false;
}

bool products(const Kernels& k, const Kernels& baseline, const Weight& p) {
  constexpr int MANY = TOKENS + 16;
  const Floats x = random_floats(size_t(MANY) * size_t(p.K));
  bool fine = agree("many", k, p, many(k, p, x, MANY), many(baseline, p, x, MANY));
  const Floats alone = few(k, p, x, 1);
  for (int M : {1, 2, 3, 4, 6, 8}) {
    const Floats together = few(k, p, x, M);
    fine &= agree("few", k, p, together, few(baseline, p, x, M));
    for (int n = 0; n < p.N; ++n)
      if (together[size_t(n)] != alone[size_t(n)]) {
        std::fprintf(stderr, "%s: a row of kind %d is another among %d\n", k.name, int(p.kind), M);
        return false;
      }
  }
  return fine;
}

bool all_products(const Kernels& k, const Kernels& baseline, int N, int K) {
  bool fine = true;
  const auto check = [&](Kind kind, Scale scale, int group, bool biased) {
    if (group && K % group) return;
    const Stored stored(kind, scale, N, K, group, biased);
    fine &= products(k, baseline, stored.weight);
  };
  for (Kind kind : {Kind::Q2, Kind::Q3, Kind::Q4, Kind::Q5, Kind::Q6, Kind::Q8})
    for (int group : {32, 64, 128})
      for (Scale scale : {Scale::F32, Scale::F16, Scale::BF16})
        check(kind, scale, group, group != 64);
  check(Kind::FP4, Scale::E8M0, 32, false);
  check(Kind::FP4, Scale::E4M3, 16, false);
  check(Kind::FP8, Scale::E8M0, 32, false);
  for (Kind kind : {Kind::BF16, Kind::F16, Kind::F32}) check(kind, Scale::F32, 0, false);
  return fine;
}

// Attention over keys in memory of their own size: one query, and a chunk of them.
bool attention(const Kernels& k, const Kernels& baseline, int G, int D, int V, int L, int S) {
  const Floats q = random_floats(size_t(G) * size_t(L) * size_t(D));
  const Floats keys = random_floats(size_t(S) * size_t(D)), values = random_floats(size_t(S) * size_t(V));
  Heads a{};
  a.G = G, a.D = D, a.V = V, a.L = L, a.S = S, a.scale = 0.2f, a.cap = 5.0f, a.causal = true;
  a.q_head = size_t(L) * size_t(D), a.q_row = size_t(D), a.k_row = size_t(D), a.v_row = size_t(V);
  a.o_row = size_t(G) * size_t(V);
  const auto chunk = [&](const Kernels& own) {
    Floats out(size_t(L) * a.o_row), scratch(chunk_floats(a, L));
    own.attend_chunk(a, q.data(), keys.data(), values.data(), nullptr, 0, L, out.data(), scratch.data());
    return out;
  };
  const auto one = [&](const Kernels& own) {
    const size_t n = size_t(G);
    Floats out(n * size_t(V)), top(n), sum(n);
    own.attend_one(a, q.data(), keys.data(), values.data(), 0, std::min(S, KEYS), out.data(),
                   top.data(), sum.data());
    out.insert(out.end(), sum.begin(), sum.end());
    return out;
  };
  Weight none{};
  return agree("chunk", k, none, chunk(k), chunk(baseline)) &
         agree("one query", k, none, one(k), one(baseline));
}

bool same_largest(const Kernels& k, const Kernels& baseline) {
  for (int n : {1, 3, 16, 63, 64, 100, 1000}) {
    const Floats x = random_floats(size_t(n));
    if (k.largest(x.data(), n) != baseline.largest(x.data(), n)) {
      std::printf("the largest of %d differs\n", n);
      return false;
    }
  }
  return true;
}

// What a change of n ranks adds to a row of `columns` values.
bool low_rank(const Kernels& k, const Kernels& baseline, Kind kind, int n, int columns) {
  const Stored a(kind, Scale::F32, n, 96, 32, false), b(kind, Scale::F32, n, columns, 32, false);
  const Floats x = random_floats(96);
  auto added = [&](const Kernels& own) {
    Floats h(static_cast<size_t>(n)), out(static_cast<size_t>(columns), 1.0f);
    own.dots(a.weight.w, kind, x.data(), n, 96, h.data());
    own.spread(b.weight.w, kind, h.data(), n, columns, out.data());
    return out;
  };
  return agree("a change", k, a.weight, added(k), added(baseline));
}

// Codes, scales and biases of 5 groups, in one row of bytes.
std::vector<uint8_t> rounded(const Kernels& k, Scale kind, int group, int bits) {
  constexpr int N = 5;
  seed = 7;
  const size_t size = kind == Scale::F32 ? 4 : 2, n = size_t(N * group);
  std::unique_ptr<uint8_t[]> x(new uint8_t[n * size]);
  for (size_t i = 0; i < n; ++i) {
    const float value = random_float();
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (kind != Scale::F32) word = kind == Scale::F16 ? word >> 16 & 0xbfff : word >> 16;
    std::memcpy(&x[i * size], &word, size);
  }
  const size_t n_codes = n * size_t(bits) / 8;
  std::vector<uint8_t> found(n_codes + 2 * N * sizeof(float));
  std::unique_ptr<uint8_t[]> codes(new uint8_t[n_codes]);
  Floats scales(N), biases(N);
  quantizer_of(k)({x.get(), kind, N, group, bits, codes.get(), scales.data(), biases.data()});
  std::memcpy(found.data(), codes.get(), n_codes);
  std::memcpy(found.data() + n_codes, scales.data(), N * sizeof(float));
  std::memcpy(found.data() + n_codes + N * sizeof(float), biases.data(), N * sizeof(float));
  return found;
}

bool same_rounding(const Kernels& k, const Kernels& baseline) {
  bool fine = true;
  for (Scale kind : {Scale::F32, Scale::BF16, Scale::F16})
    for (int group : {32, 64, 128})
      for (int bits : {2, 3, 4, 5, 6, 8})
        if (rounded(k, kind, group, bits) != rounded(baseline, kind, group, bits)) {
          std::printf("%s: groups of %d at %d bits differ\n", k.name, group, bits);
          fine = false;
        }
  return fine;
}

}  // namespace

int main() {
  const Kernels* baseline = kernels("baseline");
  bool fine = true;
  for (const char* name : {"baseline", "avx2", "avx512", "amx"}) {
    const Kernels* k = kernels(name);
    if (!k) continue;
    std::printf("%s\n", k->name);
    for (auto [N, K] : {std::pair(17, 96), {50, 160}, {5, 1152}}) fine &= all_products(*k, *baseline, N, K);
    fine &= same_largest(*k, *baseline);
    fine &= same_rounding(*k, *baseline);
    for (Kind kind : {Kind::F32, Kind::BF16, Kind::F16})
      for (auto [n, columns] : {std::pair(1, 16), {7, 48}, {24, 112}})
        fine &= low_rank(*k, *baseline, kind, n, columns);
    for (int G : {1, 3, 8})
      for (auto [L, S] : {std::pair(1, 1), {5, 5}, {7, 70}, {33, 130}})
        fine &= attention(*k, *baseline, G, 48, 32, L, S);
  }
  return fine ? 0 : 1;
}

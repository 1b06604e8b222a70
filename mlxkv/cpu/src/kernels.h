// What the kernels of one instruction set are called with. Plain data: no MLX here.
#pragma once

#include <cstddef>
#include <cstdint>

// How weights are stored. The packed kinds have a scale for each group of a row.
enum class Kind { Q2, Q3, Q4, Q5, Q6, Q8, FP4, FP8, BF16, F16, F32 };
// How scales are: floats, powers of two (8 bits), or 8-bit floats of 4 and 3 bits.
enum class Scale { F32, BF16, F16, E8M0, E4M3 };
enum class Act { NONE, SILU, GELU_TANH, CLAMPED };

// Groups of a row at most; keys that one piece of a decode step reads, and that a chunk's block has;
// queries of a chunk that are computed together.
constexpr int MOST_GROUPS = 2048, KEYS = 256, BLOCK = 64, LANES = 64;
// Rows of activations that one pass over the weights serves.
constexpr int MOST_ROWS = 8;
// A chunk's product is made of panels of unpacked weights, rows and values of each, and of tiles
// of activations, rows of each. Rows whose results are kept meanwhile.
constexpr int PANEL = 48, PANEL_VALUES = 512, TOKENS = 64, KEPT_ROWS = 512;
// Floats that `many` needs.
constexpr int MANY_FLOATS = PANEL * (PANEL_VALUES + KEPT_ROWS + 16);
// Query heads that share a KV head at most, and the longest head.
constexpr int MOST_SHARED = 16, LONGEST_HEAD = 1024;

inline int padded(int n) { return (n + 15) / 16 * 16; }
inline bool is_packed(Kind kind) { return kind < Kind::BF16; }
// Bits of a value.
constexpr int bits_of(Kind kind) {
  switch (kind) {
    case Kind::Q2: return 2;
    case Kind::Q3: return 3;
    case Kind::Q5: return 5;
    case Kind::Q6: return 6;
    case Kind::Q4: case Kind::FP4: return 4;
    case Kind::Q8: case Kind::FP8: return 8;
    case Kind::F32: return 32;
    default: return 16;
  }
}

// Values in a word of a weight that is read word by word; 1 where they are read in order.
inline int values_of_word(Kind kind) {
  switch (kind) {
    case Kind::Q4: case Kind::FP4: return 8;
    case Kind::Q8: case Kind::FP8: return 4;
    case Kind::BF16: case Kind::F16: return 2;
    default: return 1;
  }
}

// A matrix [N, K], rows one behind the other; `biases` are null where they are -2^(bits-1) scale.
struct Weight {
  const uint32_t* w;
  const void *scales, *biases;
  Scale scale;
  Kind kind;
  int N, K, group;

  int n_groups() const { return is_packed(kind) ? K / group : 0; }
};

// Attention of the G query heads that share one KV head.
struct Heads {
  int G, D, V, L, S;  // head sizes of keys and values; queries, keys
  size_t q_head, q_row, k_row, v_row, o_row;
  float scale, cap;  // cap 0: none
  bool causal;
  const bool* mask;  // [L, S] or null
  size_t mask_row;
};

// Rows of KV as 4- or 8-bit codes with scales and biases a group.
struct Codes {
  const uint32_t* codes;
  const void *scales, *biases;
  Scale scale;
  int bits, group, dim;       // values that a row has
  size_t code_row, scale_row;  // from row to row, in words and in scales
};

struct Kernels {
  const char* name;
  // Floats that a prepared row takes.
  int (*length)(const Weight&);
  // A row of activations as `rows` takes it: row m of M that are prepared together, which take M
  // times `length`.
  void (*prepare)(const Weight&, const float* x, int m, int M, float* out);
  void (*group_sums)(const Weight&, const float* x, float* out);
  // out[m * ldo + n - first] for the weight's rows [first, last) and M = 1 to 4, 6 or 8 prepared
  // rows. `sums` are those of `group_sums`, a row behind the other.
  void (*rows)(const Weight&, const float* x, const float* sums, int M, int first, int last,
               float* out, int ldo);
  // 16 rows of activations as `many` takes them: those from `first` on of `width`, a tile.
  void (*prepare_tile)(const Weight&, const float* const* x, int first, int width, float* out);
  // out[m * PANEL + r] for R <= PANEL rows of the weight and M rows of activations in tiles of
  // TOKENS (the last of fewer), a multiple of 16 and at most KEPT_ROWS. `scratch` is MANY_FLOATS.
  void (*many)(const Weight&, const float* x, const float* sums, int M, int first, int R, float* out,
               float* scratch);
  // out[j] = row j of a [n, K] times x; a is BF16, F16 or F32, K a multiple of 16.
  void (*dots)(const void* a, Kind, const float* x, int n, int K, float* out);
  // out[i] += the sum over j of h[j] b[i / 16][j][i % 16] for i < n, a multiple of 16, and r ranks;
  // b is BF16, F16 or F32.
  void (*spread)(const void* b, Kind, const float* h, int r, int n, float* out);
  // Scales or biases from `at` on as floats.
  void (*numbers)(const void*, Scale, size_t at, int n, float* out);
  void (*gate)(const float* gate, const float* up, float* out, int n, Act, float alpha, float limit);
  // `w` may be null.
  void (*rms)(const float* x, const float* w, float eps, int n, float* out);
  void (*rotate)(const float* x, const float* c, const float* s, int half, int n, float* out);
  // The largest of n values; NaN where one is.
  float (*largest)(const float* x, int n);
  void (*unpack)(const Codes&, int first, int n, float* out, int ldo);
  // One query over the keys [first, last): weighted values, and the maximum and sum of each head.
  void (*attend_one)(const Heads&, const float* q, const float* k, const float* v, int first,
                     int last, float* out, float* top, float* sum);
  // Queries [first, last) over all keys that they see. `scratch` is floats as `chunk_floats` says.
  void (*attend_chunk)(const Heads&, const float* q, const float* k, const float* v,
                       const float* sinks, int first, int last, float* out, float* scratch);
};

inline size_t chunk_floats(const Heads& a, int n) {
  const size_t panels = (size_t(n) * a.G + LANES - 1) / LANES;
  return LANES * (panels * (a.D + a.V + 2) + BLOCK + 1);
}

// Those of an instruction set by name, or of the best that this machine has; null for unknown.
const Kernels* kernels(const char* name);

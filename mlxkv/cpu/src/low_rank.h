// Changes of products by matrices of low rank, of which each row has its own: see `nn/lora_rows`.
#pragma once

#include "op.h"

// Ranks [first, last) of a change, which add to columns [start, stop) of the product.
struct LowRankPart {
  int first, last, start, stop;
  size_t at = 0;  // where its values begin in `b`

  int rank() const { return last - first; }
  size_t n_values() const { return size_t(rank()) * padded(stop - start); }
};

// Row i becomes (row i) factor + shift + ((x_i a^T) scales) b, with those of change
// `of[i % of.size()]`; a change of -1 leaves it as it is.
struct LowRanks {
  const mx::array &a, &b;         // [n, R, K] and [n, values of all parts], float32 or 16 bits
  const mx::array& scales;        // [n, R], float32
  const Maybe &factor, &shift;    // [n, N], float32
  std::vector<int> of;
  std::vector<LowRankPart> parts;  // values of a part: [columns / 16, ranks, 16]
};
using MaybeLow = std::optional<LowRanks>;

// Their numbers: where the arrays lie is known when they are used.
struct LowRankShape {
  Weight a{};
  Kind b_kind = Kind::F32;
  size_t n_values = 0;
  int N = 0;  // columns of the product
  bool has_factor = false, has_shift = false;
  std::vector<int> of;
  std::vector<LowRankPart> parts;

  // Of a product [n_rows, N] of rows of K.
  LowRankShape(const LowRanks&, int K, int N, int n_rows);
  // What tells two of them apart.
  void add_to(Op::Numbers&) const;
};
using MaybeLowShape = std::optional<LowRankShape>;

// The numbers of changes, if there are any, whose arrays are added to `in`.
MaybeLowShape low_rank_shape(const MaybeLow&, int K, int N, int n_rows, Inputs& in);

// Changes at work in one product.
class LowRank {
 public:
  // Takes the arrays of `low_rank_shape` off `in`.
  LowRank(const LowRankShape& shape, const Arrays& in, size_t& at, int n_rows);

  // First rows of x are multiplied with `a`: here, or by who asks where all have one change.
  void multiply(const float* x) const;
  bool is_one() const { return shape_.of.size() == 1 && shape_.of[0] >= 0; }
  Weight matrix() const;  // `a` of that change
  int n_ranks() const { return shape_.a.N; }
  float* ranks() const { return h_; }  // [n_rows, R], which `scale` completes
  void scale() const;

  // Columns [first, last) of row i of the product; up to 15 values behind them are written.
  void change(int i, int first, int last, float* values) const;
  // Begins to read what that needs.
  void fetch(int i, int first, int last) const;

 private:
  // Calls f(values of `b`, part, first column, last) for the parts of row i that meet columns.
  template <class F>
  void each(int i, int first, int last, F&& f) const;

  const LowRankShape& shape_;
  const char *a_, *b_;
  const float *scales_, *factor_ = nullptr, *shift_ = nullptr;
  std::vector<int> of_;  // the change of each row
  size_t b_bytes_;       // of a value of `b`
  float* h_;  // [n_rows, R]
};

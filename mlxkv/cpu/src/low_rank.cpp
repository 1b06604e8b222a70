#include "low_rank.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace {

// Ranks that are a piece of work.
constexpr int RANKS = 8;

Kind kind_of(const mx::array& x) {
  if (x.dtype() == mx::float32) return Kind::F32;
  if (x.dtype() == mx::bfloat16) return Kind::BF16;
  require(x.dtype() == mx::float16, "changes are no floats");
  return Kind::F16;
}

// 1 to 4, 6 or 8 rows are computed at a time.
int whole_rows(int n) { return n > 4 ? (n + 1) / 2 * 2 : n; }

}  // namespace

LowRankShape::LowRankShape(const LowRanks& low, int K, int N, int n_rows)
    : N(N), has_factor(low.factor), has_shift(low.shift), of(low.of), parts(low.parts) {
  require(low.a.ndim() == 3 && low.a.shape(2) == K && K % 32 == 0, "changes of other rows");
  const int n = low.a.shape(0);
  a.kind = kind_of(low.a), a.K = K, a.N = low.a.shape(1);
  b_kind = kind_of(low.b);
  for (auto& part : parts) {
    require(0 <= part.first && part.first < part.last && part.last <= a.N, "changes of other ranks");
    require(0 <= part.start && part.start % 16 == 0 && part.start < part.stop && part.stop <= N,
            "changes of other columns");
    part.at = n_values;
    n_values += part.n_values();
  }
  require(low.b.ndim() == 2 && low.b.shape(0) == n && size_t(low.b.shape(1)) == n_values,
          "changes of another size");
  require(!of.empty() && n_rows % of.size() == 0, "changes for other rows");
  for (int i : of) require(-1 <= i && i < n, "there is no such change");
  require_floats(low.factor, {n, N}, "factors of another product");
  require_floats(low.shift, {n, N}, "shifts of another product");
}

void LowRankShape::add_to(Op::Numbers& numbers) const {
  for (int n : {int(has_factor), int(has_shift)}) numbers.push_back(n);
  numbers.insert(numbers.end(), of.begin(), of.end());
  for (auto& part : parts)
    for (int n : {part.first, part.last, part.start, part.stop}) numbers.push_back(n);
}

MaybeLowShape low_rank_shape(const MaybeLow& low, int K, int N, int n_rows, Inputs& in) {
  if (!low) return {};
  MaybeLowShape shape(std::in_place, *low, K, N, n_rows);
  in.arrays.push_back(low->a);
  in.arrays.push_back(low->b);
  in.add(low->factor);
  in.add(low->shift);
  return shape;
}

LowRank::LowRank(const LowRankShape& shape, const Arrays& in, size_t& at, const float* x, int n_rows)
    : shape_(shape), a_(in[at].data<char>()), b_(in[at + 1].data<char>()) {
  at += 2;
  if (shape.has_factor) factor_ = floats_of(in[at++]);
  if (shape.has_shift) shift_ = floats_of(in[at++]);
  static thread_local Scratch kept;
  h_ = kept.floats(size_t(n_rows) * shape.a.N);
  struct Piece {
    int first, count, rank;
  };
  std::vector<Piece> pieces;
  for (int i = 0, n = 1; i < n_rows; i += n, n = 1) {
    if (of(i) < 0) continue;
    while (n < MOST_ROWS && i + n < n_rows && of(i + n) == of(i)) ++n;
    for (int rank = 0; rank < shape.a.N; rank += RANKS) pieces.push_back({i, n, rank});
  }
  Pool::get().run(int(pieces.size()), [&](int i) {
    const auto& piece = pieces[i];
    reduce(x, piece.first, piece.count, piece.rank, std::min(shape.a.N, piece.rank + RANKS));
  });
}

// Ranks [start, stop) of rows with one change.
void LowRank::reduce(const float* x, int first, int count, int start, int stop) {
  const auto& kernels = in_use();
  Weight a = shape_.a;
  a.w = reinterpret_cast<const uint32_t*>(a_ + size_t(of(first)) * a.N * a.K * bits_of(a.kind) / 8);
  const int M = whole_rows(count), length = length_of(a, kernels.lanes);
  static thread_local Scratch local;
  float* rows = local.floats(size_t(M) * (length + RANKS));
  float* found = rows + size_t(M) * length;
  if (M > count) std::memset(rows, 0, sizeof(float) * M * length);
  for (int m = 0; m < count; ++m)
    kernels.prepare(a, x + size_t(first + m) * a.K, M, rows + m * kernels.lanes);
  kernels.rows(a, rows, nullptr, M, start, stop, found, RANKS);
  for (int m = 0; m < count; ++m)
    std::memcpy(h_ + size_t(first + m) * a.N + start, found + m * RANKS, sizeof(float) * (stop - start));
}

template <class F>
void LowRank::each(int i, int first, int last, F&& f) const {
  const char* own = b_ + of(i) * shape_.n_values * bits_of(shape_.b_kind) / 8;
  for (const auto& part : shape_.parts) {
    const int start = std::max(first, part.start), stop = std::min(last, part.stop);
    if (start >= stop) continue;
    const size_t at = part.at + size_t(start - part.start) * part.rank();
    f(own + at * bits_of(shape_.b_kind) / 8, part, start, stop);
  }
}

void LowRank::fetch(int i, int first, int last) const {
  if (of(i) < 0) return;
  each(i, first, last, [&](const char* b, const LowRankPart& part, int start, int stop) {
    const size_t n_bytes = size_t(padded(stop - start)) * part.rank() * bits_of(shape_.b_kind) / 8;
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(b + at);
  });
}

void LowRank::change(int i, int first, int last, float* values) const {
  const int change = of(i);
  if (change < 0) return;
  const size_t row = size_t(change) * shape_.N + first;
  if (factor_)
    for (int c = 0; c < last - first; ++c) values[c] *= factor_[row + c];
  if (shift_)
    for (int c = 0; c < last - first; ++c) values[c] += shift_[row + c];
  each(i, first, last, [&](const char* b, const LowRankPart& part, int start, int stop) {
    in_use().spread(b, shape_.b_kind, h_ + size_t(i) * shape_.a.N + part.first, part.rank(),
                    padded(stop - start), values + start - first);
  });
}

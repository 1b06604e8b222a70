#include "low_rank.h"

#include <algorithm>
#include <cstring>

#include "pool.h"

namespace {

// Ranks that are a piece of work, where rows are few.
constexpr int RANKS = 8;

Kind kind_of(const mx::array& x) {
  if (x.dtype() == mx::float32) return Kind::F32;
  if (x.dtype() == mx::bfloat16) return Kind::BF16;
  require(x.dtype() == mx::float16, "changes are no floats");
  return Kind::F16;
}

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
  require_floats(low.scales, {n, a.N}, "scales of other ranks");
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
  in.arrays.push_back(low->scales);
  in.add(low->factor);
  in.add(low->shift);
  return shape;
}

LowRank::LowRank(const LowRankShape& shape, const Arrays& in, size_t& at, int n_rows)
    : shape_(shape),
      a_(in[at].data<char>()),
      b_(in[at + 1].data<char>()),
      scales_(floats_of(in[at + 2])),
      of_(n_rows),
      b_bytes_(bits_of(shape.b_kind) / 8) {
  at += 3;
  for (int i = 0; i < n_rows; ++i) of_[i] = shape.of[i % shape.of.size()];
  if (shape.has_factor) factor_ = floats_of(in[at++]);
  if (shape.has_shift) shift_ = floats_of(in[at++]);
  static thread_local Scratch kept;
  h_ = kept.floats(size_t(n_rows) * shape.a.N);
}

void LowRank::multiply(const float* x) const {
  // As few pieces as keep all cores at work.
  const int R = n_ranks(), n_rows = int(of_.size());
  const int n = n_rows < 2 * Pool::get().size() ? (R + RANKS - 1) / RANKS : 1;
  const int step = n > 1 ? RANKS : R;
  Pool::get().run(n_rows * n, [&](int piece) {
    const int i = piece / n, rank = piece % n * step;
    if (of_[i] < 0) return;
    const Weight& a = shape_.a;
    const size_t row = size_t(of_[i]) * R + rank;
    const int count = std::min(step, R - rank);
    float* h = h_ + size_t(i) * R + rank;
    in_use().dots(a_ + row * a.K * bits_of(a.kind) / 8, a.kind, x + size_t(i) * a.K, count, a.K, h);
    for (int j = 0; j < count; ++j) h[j] *= scales_[row + j];
  });
}

Weight LowRank::matrix() const {
  Weight one = shape_.a;
  const size_t n_bytes = size_t(one.N) * one.K * bits_of(one.kind) / 8;
  one.w = reinterpret_cast<const uint32_t*>(a_ + shape_.of[0] * n_bytes);
  return one;
}

void LowRank::scale() const {
  const int R = n_ranks();
  const float* scales = scales_ + size_t(shape_.of[0]) * R;
  for (size_t i = 0; i < of_.size(); ++i)
    for (int j = 0; j < R; ++j) h_[i * R + j] *= scales[j];
}

template <class F>
void LowRank::each(int i, int first, int last, F&& f) const {
  const char* own = b_ + of_[i] * shape_.n_values * b_bytes_;
  for (const auto& part : shape_.parts) {
    const int start = std::max(first, part.start), stop = std::min(last, part.stop);
    if (start >= stop) continue;
    const size_t at = part.at + size_t(start - part.start) * part.rank();
    f(own + at * b_bytes_, part, start, stop);
  }
}

void LowRank::fetch(int i, int first, int last) const {
  if (of_[i] < 0) return;
  each(i, first, last, [&](const char* b, const LowRankPart& part, int start, int stop) {
    const size_t n_bytes = size_t(padded(stop - start)) * part.rank() * b_bytes_;
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(b + at);
  });
}

void LowRank::change(int i, int first, int last, float* values) const {
  const int change = of_[i];
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

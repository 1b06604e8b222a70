#include "logits.h"

#include <algorithm>

#include "pool.h"

namespace {

// Values of a row that are a piece of work.
constexpr int PIECE_OF_ROW = 32768;

void check_logits(const mx::array& logits) {
  require(logits.dtype() == mx::float32 && logits.ndim() > 0 && logits.shape(-1) > 0,
          "logits are no rows of float32");
}

mx::Shape of_rows(const mx::array& logits) {
  auto shape = logits.shape();
  shape.pop_back();
  return shape;
}

int pieces_of(int n) { return (n + PIECE_OF_ROW - 1) / PIECE_OF_ROW; }

// The largest of each piece of each row, [rows, pieces].
const float* tops_of(const float* x, int n_rows, int n) {
  static thread_local Scratch kept;
  const int pieces = pieces_of(n);
  float* tops = kept.floats(size_t(n_rows) * pieces);
  Pool::get().run(n_rows * pieces, [&](int i) {
    const int first = i % pieces * PIECE_OF_ROW;
    tops[i] = in_use().largest(x + size_t(i / pieces) * n + first, std::min(PIECE_OF_ROW, n - first));
  });
  return tops;
}

// The first of n values that is `top`; n where none is.
int first_of(const float* x, int n, float top) {
  constexpr int SOME = 1024;
  int at = 0;
  while (n - at > SOME && in_use().largest(x + at, SOME) != top) at += SOME;
  while (at < n && x[at] != top) ++at;
  return at;
}

}  // namespace

mx::array largest(const mx::array& logits) {
  check_logits(logits);
  auto run = [](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x;
    const int n = in[0].shape(-1), n_rows = int(in[0].size() / n), pieces = pieces_of(n);
    const float* tops = tops_of(dense(in[0], of_x), n_rows, n);
    float* found = floats_of(out);
    for (int row = 0; row < n_rows; ++row)
      found[row] = in_use().largest(tops + size_t(row) * pieces, pieces);
  };
  return operation("MlxkvLargest", of_rows(logits), {}, run, {logits});
}

mx::array first_largest(const mx::array& logits) {
  check_logits(logits);
  auto run = [](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x;
    const int n = in[0].shape(-1), n_rows = int(in[0].size() / n), pieces = pieces_of(n);
    const float* x = dense(in[0], of_x);
    const float* tops = tops_of(x, n_rows, n);
    auto* found = out.data<uint32_t>();
    for (int row = 0; row < n_rows; ++row) {
      const float* of_row = tops + size_t(row) * pieces;
      const float top = in_use().largest(of_row, pieces);
      const int first = first_of(of_row, pieces, top) * PIECE_OF_ROW;
      const int at = first < n ? first + first_of(x + size_t(row) * n + first, n - first, top) : n;
      found[row] = at < n ? uint32_t(at) : 0;
    }
  };
  return operation("MlxkvFirstLargest", of_rows(logits), {}, run, {logits}, mx::uint32);
}

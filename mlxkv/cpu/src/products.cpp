#include "products.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "pool.h"

namespace {

// Rows from which a chunk's product is made with weights that are unpacked before, a panel at a time
// (each part of a sum begins at 0, which keeps digits).
constexpr int MANY_ROWS = 16;
// Values of a weight that are a piece of work, and of one that few rows meet.
constexpr int PIECE = 32768;

// Rows [first, first + count) that one weight is for; as the kernels take them from row `place` on.
struct Group {
  Weight weight;
  const float* bias;
  int first, count, place = 0;
};

struct Job {
  std::vector<Group> groups;
  const float* x;   // rows of K
  const int* from;  // row of x of each row; null: its own
  const int* to;    // row of the result
  int n_rows, K, out_dim;
  const float* norm;
  bool is_normed;
  float eps;
  const float* residual;
  Activation activation;
  bool is_chunk;
  float* out;
  const LowRank* low = nullptr;

  bool has_act() const { return activation.act != Act::NONE; }
  bool is_many(const Group& g) const { return is_chunk && g.count >= MANY_ROWS; }
  const float* row(int i) const { return x + size_t(from ? from[i] : i) * K; }
  size_t target(int i) const { return size_t(to ? to[i] : i) * out_dim; }

  // Results of R columns from `first` on, of one row: the gate's and the up projection's.
  void finish(const float* bias, float* a, float* u, int first, int R, int i) const {
    const auto& kernels = in_use();
    if (bias)
      for (int c = 0; c < R; ++c) a[c] += bias[first + c];
    if (bias && has_act())
      for (int c = 0; c < R; ++c) u[c] += bias[out_dim + first + c];
    if (low) low->change(i, first, first + R, a);
    if (low && has_act()) low->change(i, out_dim + first, out_dim + first + R, u);
    if (has_act()) kernels.gate(a, u, a, R, activation.act, activation.alpha, activation.limit);
    const size_t at = target(i) + first;
    if (residual)
      for (int c = 0; c < R; ++c) a[c] += residual[at + c];
    std::memcpy(out + at, a, sizeof(float) * R);
  }
};

// 1 to 4, 6 or 8 rows are computed at a time.
int whole(int n) { return n > 4 ? (n + 1) / 2 * 2 : n; }
// Rows that are computed for n of them.
int filled(int n) { return n / MOST_ROWS * MOST_ROWS + whole(n % MOST_ROWS); }

// Rows as the kernels take them: prepared, with sums of their groups, those of a pass together.
// Those of a group of many are in tiles of TOKENS rows (the last of fewer, a multiple of 16). Both
// are filled up with zeros.
class Prepared {
 public:
  explicit Prepared(Job& job) : job_(job) {
    const Weight& weight = job.groups[0].weight;
    n_sums_ = padded(weight.n_groups());
    length_ = in_use().length(weight);
    int n_rows = 0;
    for (auto& group : job.groups) {
      group.place = n_rows;
      n_rows += job.is_many(group) ? padded(group.count) : filled(group.count);
    }
    static thread_local Scratch kept;
    values_ = kept.floats(size_t(n_rows) * (length_ + n_sums_));
    sums_ = values_ + size_t(n_rows) * length_;
    for (const auto& group : job.groups) {
      if (!job.is_many(group)) fill(group);
      if (job.is_many(group))
        Pool::get().run(padded(group.count) / 16, [&](int i) { prepare_tile(group, i * 16); });
      else if (group.count >= MANY_ROWS)
        Pool::get().run(group.count, [&](int i) { prepare(group, i); });
      else
        for (int i = 0; i < group.count; ++i) prepare(group, i);
    }
  }

  int length() const { return length_; }
  const float* sums(int row) const { return sums_ + size_t(row) * n_sums_; }
  float* values(int row) const { return values_ + size_t(row) * length_; }
  // A tile from row `at` of a group on, and its rows.
  float* tile(const Group& group, int at) const { return values(group.place + at); }
  static int width(const Group& group, int at) {
    return std::min(TOKENS, padded(group.count) - at);
  }

 private:
  // A row, normed.
  const float* row(int i, float* normed) const {
    const float* x = job_.row(i);
    if (!job_.is_normed) return x;
    in_use().rms(x, job_.norm, job_.eps, job_.K, normed);
    return normed;
  }

  // Zeros where the rows of a group's last pass are to be, if they are too few.
  void fill(const Group& group) {
    const int rest = group.count % MOST_ROWS, first = group.place + group.count - rest;
    if (whole(rest) == rest) return;
    std::memset(values(first), 0, sizeof(float) * whole(rest) * length_);
    std::memset(sums_ + size_t(first) * n_sums_, 0, sizeof(float) * whole(rest) * n_sums_);
  }

  void prepare(const Group& group, int i) {
    static thread_local Scratch local;
    const float* x = row(group.first + i, local.floats(job_.K));
    const int pass = i / MOST_ROWS * MOST_ROWS, M = whole(std::min(MOST_ROWS, group.count - pass));
    in_use().prepare(group.weight, x, i - pass, M, values(group.place + pass));
    add_sums(group, x, i);
  }
  void add_sums(const Group& group, const float* x, int i) {
    if (n_sums_)
      in_use().group_sums(group.weight, x, sums_ + size_t(group.place + i) * n_sums_);
  }

  // 16 rows of a group.
  void prepare_tile(const Group& group, int first) {
    static thread_local Scratch local;
    float* normed = local.floats(size_t(16 + 1) * job_.K);
    float* zeros = normed + size_t(16) * job_.K;
    std::memset(zeros, 0, sizeof(float) * job_.K);
    const float* rows[16];
    for (int i = 0; i < 16; ++i)
      rows[i] = first + i < group.count
                    ? row(group.first + first + i, normed + size_t(i) * job_.K)
                    : zeros;
    const int start = first / TOKENS * TOKENS;
    in_use().prepare_tile(group.weight, rows, first - start, width(group, start),
                          tile(group, start));
    for (int i = 0; i < 16; ++i) add_sums(group, rows[i], first + i);
  }

  const Job& job_;
  int length_, n_sums_;
  float *values_, *sums_;
};

// Columns [first, last) of n rows of a group from row `m` on, whose changes begin to be read for a
// few columns at a time: a core has to wait behind too many reads at once.
void changed_rows(const Job& job, const Group& group, const Prepared& x, int m, int n, int first,
                  int last, float* out, int ldo) {
  const int i = group.place + m;
  for (int c = first; c < last; c += 16) {
    const int stop = std::min(last, c + 16);
    for (int j = 0; j < n; ++j) job.low->fetch(group.first + m + j, c, stop);
    in_use().rows(group.weight, x.values(i), x.sums(i), whole(n), c, stop, out + c - first, ldo);
  }
}

// Columns [first, last) of the result, of the rows of a group.
void few_rows(const Job& job, const Group& group, const Prepared& x, int first, int last) {
  const auto& kernels = in_use();
  const int R = last - first, step = (R + 15) / 16 * 16;
  static thread_local Scratch local;
  float *a = local.floats(size_t(2) * MOST_ROWS * step), *u = a + MOST_ROWS * step;
  for (int m = 0; m < group.count; m += MOST_ROWS) {
    const int n = std::min(MOST_ROWS, group.count - m), i = group.place + m;
    // Rows behind the group's are zeros, whose results are left.
    if (!job.low) {
      kernels.rows(group.weight, x.values(i), x.sums(i), whole(n), first, last, a, step);
      if (job.has_act())
        kernels.rows(group.weight, x.values(i), x.sums(i), whole(n), job.out_dim + first,
                     job.out_dim + last, u, step);
    } else {
      changed_rows(job, group, x, m, n, first, last, a, step);
      if (job.has_act())
        changed_rows(job, group, x, m, n, job.out_dim + first, job.out_dim + last, u, step);
    }
    for (int j = 0; j < n; ++j)
      job.finish(group.bias, a + j * step, u + j * step, first, R, group.first + m + j);
  }
}

void many_rows(const Job& job, const Group& group, const Prepared& x, int first, int last) {
  const auto& kernels = in_use();
  const int R = last - first, kept = std::min(padded(group.count), KEPT_ROWS);
  static thread_local Scratch local;
  float* scratch = local.floats(MANY_FLOATS + size_t(2) * kept * PANEL);
  float *a = scratch + MANY_FLOATS, *u = a + size_t(kept) * PANEL;
  for (int m = 0; m < group.count; m += kept) {
    const int n = std::min(kept, group.count - m), place = group.place + m;
    kernels.many(group.weight, x.tile(group, m), x.sums(place), padded(n), first, R, a, scratch);
    if (job.has_act())
      kernels.many(group.weight, x.tile(group, m), x.sums(place), padded(n), job.out_dim + first, R,
                   u, scratch);
    for (int i = 0; i < n; ++i)
      job.finish(group.bias, a + i * PANEL, u + i * PANEL, first, R, group.first + m + i);
  }
}

void compute(Job& job) {
  Prepared x(job);
  struct Piece {
    const Group* group;
    int first, last;
  };
  std::vector<Piece> pieces;
  for (const auto& group : job.groups) {
    int step = PANEL;
    if (!job.is_many(group)) {
      // A multiple of 16 columns: a cache line of the result is one thread's.
      step = std::max(16, PIECE / (group.count > MOST_ROWS ? 8 : 1) / job.K / 16 * 16);
      int share = job.out_dim / Pool::get().size() / int(job.groups.size());
      step = std::min(step, std::max(16, (share + 15) / 16 * 16));
    }
    for (int first = 0; first < job.out_dim; first += step)
      pieces.push_back({&group, first, std::min(job.out_dim, first + step)});
  }
  Pool::get().run(int(pieces.size()), [&](int i) {
    const auto& piece = pieces[i];
    auto rows = job.is_many(*piece.group) ? many_rows : few_rows;
    rows(job, *piece.group, x, piece.first, piece.last);
  });
}

// Products of rows with `a` of the one change that all of them have, as those with any weight.
void to_ranks(const Job& job, const LowRank& low) {
  Job ranks{};
  ranks.groups = {{low.matrix(), nullptr, 0, job.n_rows}};
  ranks.x = job.x;
  ranks.n_rows = job.n_rows;
  ranks.K = job.K;
  ranks.out_dim = low.n_ranks();
  ranks.is_chunk = true;
  ranks.out = low.ranks();
  compute(ranks);
  low.scale();
}

// The same of rows that are changed; their arrays are taken off `in`.
void compute(Job& job, const MaybeLowShape& changes, const Arrays& in, size_t& at) {
  if (!changes) return compute(job);
  static thread_local Scratch of_rows;
  if (job.is_normed) {
    float* rows = of_rows.floats(size_t(job.n_rows) * job.K);
    auto norm = [&](int i) {
      in_use().rms(job.row(i), job.norm, job.eps, job.K, rows + size_t(i) * job.K);
    };
    if (job.n_rows >= MANY_ROWS)
      Pool::get().run(job.n_rows, norm);
    else
      for (int i = 0; i < job.n_rows; ++i) norm(i);
    job.x = rows, job.is_normed = false;
  }
  const LowRank low(*changes, in, at, job.n_rows);
  if (job.is_chunk && job.n_rows >= MANY_ROWS && low.is_one())
    to_ranks(job, low);
  else
    low.multiply(job.x);
  job.low = &low;
  compute(job);
}

}  // namespace

mx::array linear(const mx::array& x, const Weights& weights, const Maybe& norm, float eps,
                 const Maybe& residual, Activation activation, const MaybeLow& low) {
  require(x.dtype() == mx::float32 && x.ndim() >= 2, "x is no rows of float32");
  const int K = x.shape(-1);
  const Weight shape = shape_of(weights, K);
  const int out_dim = activation.act == Act::NONE ? shape.N : shape.N / 2;
  const bool has_biases = weights.biases.has_value(), has_bias = weights.bias.has_value();
  const bool is_normed = eps >= 0, has_norm = norm.has_value(), has_residual = residual.has_value();
  const bool is_chunk = x.shape(-2) > 1;
  auto out_shape = x.shape();
  out_shape.back() = out_dim;
  require_floats(norm, {K}, "a norm's scale is not float32 of x's length");
  require_floats(residual, out_shape, "what is added is not float32 of the result's shape");
  Inputs in({x});
  add_weights(in, weights);
  in.add(norm);
  in.add(residual);
  const auto changes = low_rank_shape(low, K, shape.N, int(x.size() / K), in);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x, of_residual;
    size_t at = 1;
    auto located = locate(shape, in, at, has_biases, has_bias, 0);
    Job job{};
    job.n_rows = int(in[0].size() / K);
    if (!job.n_rows) return;
    job.groups = {{located.weight, located.bias, 0, job.n_rows}};
    job.x = dense(in[0], of_x);
    job.K = K;
    job.out_dim = out_dim;
    job.is_normed = is_normed;
    job.norm = has_norm ? floats_of(in[at++]) : nullptr;
    job.eps = eps;
    job.residual = has_residual ? dense(in[at++], of_residual) : nullptr;
    job.activation = activation;
    job.is_chunk = is_chunk;
    job.out = floats_of(out);
    compute(job, changes, in, at);
  };
  Op::Numbers numbers{double(shape.kind), double(shape.group), double(has_biases), double(has_bias),
                      double(has_norm), eps, double(has_residual), double(activation.act)};
  if (changes) changes->add_to(numbers);
  return operation("MlxkvLinear", out_shape, numbers, run, in.arrays);
}

mx::array experts(const mx::array& x, const Weights& weights, const mx::array& chosen,
                  Activation activation) {
  require(x.dtype() == mx::float32, "x is not float32");
  require(chosen.dtype() == mx::uint32 || chosen.dtype() == mx::int32, "experts are 32-bit integers");
  const int K = x.shape(-1), k = chosen.shape(-1), E = weights.w.shape(0);
  const Weight shape = shape_of(weights, K);
  const int out_dim = activation.act == Act::NONE ? shape.N : shape.N / 2;
  const bool has_biases = weights.biases.has_value(), has_bias = weights.bias.has_value();
  const bool is_shared = x.size() / K * k == chosen.size();
  require(is_shared || x.size() / K == chosen.size(), "rows and experts differ");
  const bool is_chunk = chosen.ndim() > 1 && chosen.shape(-2) > 1;
  Inputs in({x, chosen});
  add_weights(in, weights);
  auto run = [=](const Arrays& in, mx::array& out) {
    static thread_local Scratch of_x, of_chosen;
    const int n = int(in[1].size());
    if (!n) return;
    // Rows sorted by expert, those of one in their own order.
    std::vector<int> of_row(n), first(E + 1), to(n), from(n);
    const int32_t* experts = dense_of<int32_t>(in[1], of_chosen);
    for (int i = 0; i < n; ++i) {
      of_row[i] = std::clamp(experts[i], 0, E - 1);
      ++first[of_row[i] + 1];
    }
    for (int e = 0; e < E; ++e) first[e + 1] += first[e];
    auto next = first;
    for (int i = 0; i < n; ++i) {
      const int at = next[of_row[i]]++;
      to[at] = i;
      from[at] = is_shared ? i / k : i;
    }
    Job job{};
    for (int e = 0; e < E; ++e) {
      if (first[e + 1] == first[e]) continue;
      size_t at = 2;
      auto located = locate(shape, in, at, has_biases, has_bias, e);
      job.groups.push_back({located.weight, located.bias, first[e], first[e + 1] - first[e]});
    }
    job.x = dense(in[0], of_x);
    job.from = from.data();
    job.to = to.data();
    job.n_rows = n;
    job.K = K;
    job.out_dim = out_dim;
    job.activation = activation;
    job.is_chunk = is_chunk;
    job.out = floats_of(out);
    compute(job);
  };
  auto out_shape = chosen.shape();
  out_shape.push_back(out_dim);
  return operation("MlxkvExperts", out_shape,
                   {double(shape.kind), double(shape.group), double(has_biases), double(has_bias),
                    double(is_shared), double(activation.act)},
                   run, in.arrays);
}

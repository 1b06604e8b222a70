// What the operations share: one MLX primitive, and the memory that they work in.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"
#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace mx = mlx::core;
using Arrays = std::vector<mx::array>;
using Maybe = std::optional<mx::array>;

// The kernels in use.
const Kernels& in_use();
void use(const Kernels* kernels);

// One class for all operations. What runs is a function that is made with the operation; what
// tells two of them apart is their name and numbers.
class Op : public mx::Primitive {
 public:
  using Run = std::function<void(const Arrays& inputs, mx::array& out)>;
  using Numbers = std::vector<double>;

  // With `updates` the result begins as the first input: in its place where nothing else reads it.
  Op(mx::Stream stream, const char* name, Numbers numbers, Run run, bool updates = false)
      : Primitive(stream),
        name_(name),
        numbers_(std::move(numbers)),
        run_(std::move(run)),
        updates_(updates) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override;
  void eval_gpu(const Arrays&, Arrays&) override;
  const char* name() const override { return name_; }
  bool is_equivalent(const mx::Primitive& other) const override;

 private:
  const char* name_;
  Numbers numbers_;
  Run run_;
  bool updates_;
};

// An array that `run` computes.
mx::array operation(const char* name, mx::Shape shape, Op::Numbers numbers, Op::Run run,
                    Arrays inputs, mx::Dtype dtype = mx::float32);

// The first of `inputs`, float32, as `run` changes it; the array itself stays as it is.
mx::array update(const char* name, Op::Numbers numbers, Op::Run run, Arrays inputs);

// Memory of one thread that is kept for its next operation, at the start of a cache line: vectors
// that lie across two take twice as long.
class Scratch {
 public:
  float* floats(size_t n) {
    constexpr size_t LINE = 64;
    if (n > size_) {
      kept_.reset(new char[sizeof(float) * n + LINE]);
      size_ = n;
    }
    const auto at = reinterpret_cast<uintptr_t>(kept_.get());
    return reinterpret_cast<float*>((at + LINE - 1) / LINE * LINE);
  }

 private:
  std::unique_ptr<char[]> kept_;
  size_t size_ = 0;
};

// Values of 4 bytes of an array, rows one behind the other: as they lie, or copied.
template <class T>
const T* dense_of(const mx::array& x, Scratch& scratch) {
  static_assert(sizeof(T) == sizeof(float));
  const T* in = x.data<T>();
  if (x.flags().row_contiguous || !x.size()) return in;
  T* out = reinterpret_cast<T*>(scratch.floats(x.size()));
  const int n = x.shape(-1), rank = int(x.ndim());
  const auto stride = x.strides(-1);
  for (size_t at = 0; at < x.size(); at += n) {
    size_t rest = at / n;
    int64_t from = 0;
    for (int i = rank - 2; i >= 0; --i) {
      from += int64_t(rest % x.shape(i)) * x.strides(i);
      rest /= x.shape(i);
    }
    for (int j = 0; j < n; ++j) out[at + j] = in[from + j * stride];
  }
  return out;
}
inline const float* dense(const mx::array& x, Scratch& scratch) {
  return dense_of<float>(x, scratch);
}

// Raises std::invalid_argument, in Python ValueError.
void require(bool holds, const char* what);

// Requires float32 of that shape, where there is an array.
void require_floats(const Maybe& x, const mx::Shape& shape, const char* what);

inline const float* floats_of(const mx::array& x) { return x.data<float>(); }
inline float* floats_of(mx::array& x) { return x.data<float>(); }

// Arrays of an operation that may be left out, in the order in which they were added.
class Inputs {
 public:
  explicit Inputs(Arrays first) : arrays(std::move(first)) {}
  void add(const Maybe& x) {
    if (x) arrays.push_back(*x);
  }
  Arrays arrays;
};

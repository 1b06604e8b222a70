#include "quantize.h"

#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "rounding.h"

namespace {

// Groups whose scales are made in float32 before they are stored.
constexpr size_t SOME_GROUPS = 256;

template <class T>
void store(const float* from, size_t n, mx::array& to, size_t at) {
  T* out = to.data<T>() + at;
  for (size_t i = 0; i < n; ++i) out[i] = static_cast<T>(from[i]);
}

void store(const float* from, size_t n, mx::array& to, size_t at) {
  if (to.dtype() == mx::float32) return store<float>(from, n, to, at);
  if (to.dtype() == mx::float16) return store<mx::float16_t>(from, n, to, at);
  store<mx::bfloat16_t>(from, n, to, at);
}

void round_groups(const mx::array& x, int group, int bits, Arrays& outputs) {
  const Scale kind = x.dtype() == mx::float32   ? Scale::F32
                     : x.dtype() == mx::float16 ? Scale::F16
                                                : Scale::BF16;
  const Quantizer round = quantizer_of(in_use());
  const size_t n = x.size() / group;
  float scales[SOME_GROUPS], biases[SOME_GROUPS];
  for (size_t at = 0; at < n; at += SOME_GROUPS) {
    const size_t some = std::min(SOME_GROUPS, n - at);
    round({x.data<char>() + at * group * x.itemsize(), kind, some, group, bits,
           outputs[0].data<uint8_t>() + at * group * bits / 8, scales, biases});
    store(scales, some, outputs[1], at);
    store(biases, some, outputs[2], at);
  }
}

class Quantize : public mx::Primitive {
 public:
  Quantize(mx::Stream stream, int group, int bits)
      : Primitive(stream), group_(group), bits_(bits) {}

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    Arrays held;
    for (auto& out : outputs) {
      out.set_data(mx::allocator::malloc(out.nbytes()));
      held.push_back(mx::array::unsafe_weak_copy(out));
    }
    mx::cpu::get_command_encoder(stream()).dispatch(
        [x = mx::array::unsafe_weak_copy(inputs[0]), held = std::move(held), group = group_,
         bits = bits_]() mutable { round_groups(x, group, bits, held); });
  }
  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error("mlxkv's kernels are for the CPU backend");
  }
  const char* name() const override { return "MlxkvQuantize"; }
  bool is_equivalent(const mx::Primitive& other) const override {
    auto& op = static_cast<const Quantize&>(other);
    return group_ == op.group_ && bits_ == op.bits_;
  }

 private:
  int group_, bits_;
};

}  // namespace

Arrays quantize(const mx::array& x, int group, int bits) {
  const bool is_float =
      x.dtype() == mx::float32 || x.dtype() == mx::float16 || x.dtype() == mx::bfloat16;
  require(is_float && x.ndim() >= 2, "not rows of floats");
  require(group == 32 || group == 64 || group == 128, "groups are of 32, 64 or 128 values");
  require(bits >= 2 && bits <= 8 && bits != 7, "codes have 2, 3, 4, 5, 6 or 8 bits");
  require(x.shape(-1) % group == 0, "groups do not divide rows");
  auto codes = x.shape(), groups = x.shape();
  codes.back() = int(int64_t(x.shape(-1)) * bits / 32);
  groups.back() = x.shape(-1) / group;
  auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
  return mx::array::make_arrays({codes, groups, groups}, {mx::uint32, x.dtype(), x.dtype()},
                                std::make_shared<Quantize>(stream, group, bits),
                                {mx::contiguous(x, false, stream)});
}

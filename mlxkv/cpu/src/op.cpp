#include "op.h"

#include <cstring>
#include <stdexcept>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"

namespace {
const Kernels* chosen = kernels(nullptr);

void copy_floats(const mx::array& from, mx::array& to) {
  Scratch scratch;
  std::memcpy(floats_of(to), dense(from, scratch), to.nbytes());
}
}  // namespace

const Kernels& in_use() { return *chosen; }
void use(const Kernels* kernels) { chosen = kernels; }

void Op::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  auto& out = outputs[0];
  const bool in_place = updates_ && inputs[0].is_donatable() && inputs[0].strides(-1) == 1;
  if (in_place)
    out.copy_shared_buffer(inputs[0]);
  else
    out.set_data(mx::allocator::malloc(out.nbytes()));
  auto& encoder = mx::cpu::get_command_encoder(stream());
  Arrays held;
  for (auto& x : inputs) held.push_back(mx::array::unsafe_weak_copy(x));
  encoder.dispatch([run = run_, held = std::move(held), copies = updates_ && !in_place,
                    out = mx::array::unsafe_weak_copy(out)]() mutable {
    if (copies) copy_floats(held[0], out);
    run(held, out);
  });
}

void Op::eval_gpu(const Arrays&, Arrays&) {
  throw std::runtime_error("mlxkv's kernels are for the CPU backend");
}

bool Op::is_equivalent(const mx::Primitive& other) const {
  auto& op = static_cast<const Op&>(other);
  return !std::strcmp(name_, op.name()) && numbers_ == op.numbers_;
}

mx::array operation(const char* name, mx::Shape shape, Op::Numbers numbers, Op::Run run,
                    Arrays inputs, mx::Dtype dtype) {
  auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
  return mx::array(std::move(shape), dtype,
                   std::make_shared<Op>(stream, name, std::move(numbers), std::move(run)),
                   std::move(inputs));
}

mx::array update(const char* name, Op::Numbers numbers, Op::Run run, Arrays inputs) {
  auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
  auto shape = inputs[0].shape();
  return mx::array(std::move(shape), mx::float32,
                   std::make_shared<Op>(stream, name, std::move(numbers), std::move(run), true),
                   std::move(inputs));
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void require_floats(const Maybe& x, const mx::Shape& shape, const char* what) {
  require(!x || (x->dtype() == mx::float32 && x->shape() == shape), what);
}

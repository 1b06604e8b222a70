// Makes a CPU-only libmlx decide as it would on a Mac's GPU, and writes graphs down as JSON.
//
// shim.py compiles this with the headers of the installed wheel and overwrites the functions named
// in `replacements` below with jumps to these. The "GPU" is for building graphs: MLX has no
// kernels for it here, and evaluating anything on it raises.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <sstream>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "mlx/fast_primitives.h"
#include "mlx/graph_utils.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

using namespace mlx::core;

namespace {

bool yes() {
  return true;
}

int one_device() {
  return 1;
}

void no_stream(Stream) {}

bool falls_back_on_cpu(Stream s) {
  return s.device == Device::cpu;
}

using DeviceInfo = std::unordered_map<std::string, std::variant<std::string, size_t>>;

// An M4 Max with 128 GB; nothing that is counted hangs on the sizes.
const DeviceInfo& m4_max(int) {
  static const DeviceInfo info{
      {"device_name", std::string("Apple M4 Max")},
      {"architecture", std::string("applegpu_g16s")},
      {"max_buffer_length", size_t(86'000'000'000)},
      {"max_recommended_working_set_size", size_t(115'448'725'504)},
      {"memory_size", size_t(137'438'953'472)},
      {"resource_limit", size_t(499'000)}};
  return info;
}

struct Attention {
  int group, L, S, q_dim, v_dim;
  bool half, has_mask, array_mask, causal, sinks;
};

bool has_fused_kernel(const Attention& a) {
  auto is_one_of = [](int dim, std::initializer_list<int> dims) {
    for (int d : dims)
      if (d == dim)
        return true;
    return false;
  };
  if (a.L > 8) {
    bool known = (a.q_dim == 96 && a.v_dim == 64) ||
        (a.q_dim == a.v_dim && is_one_of(a.q_dim, {64, 72, 80, 96, 128, 192, 256}));
    bool mask_fits = !a.has_mask || a.array_mask || (a.causal && a.L <= a.S);
    return known && mask_fits;
  }
  bool known = (a.q_dim == 192 && a.v_dim == 128) || (a.q_dim == 96 && a.v_dim == 64) ||
      (a.q_dim == a.v_dim && is_one_of(a.q_dim, {64, 96, 128, 192, 256, 512}));
  if (!known || a.L > a.S || a.L * a.group > 32)
    return false;
  // 1,024 is the default of MLX_SDPA_D512_MIN_KL.
  return a.q_dim != 512 || (a.L == 1 && a.group == 8 && !a.array_mask && a.S >= 1024);
}

// ScaledDotProductAttention::use_fallback as decoded from the macOS wheel of MLX 0.32.4 for a GPU
// before the M5, whose neural accelerators take other kernels. Decode it again when MLX is bumped,
// and then raise DECODED_FROM in shim.py.
bool attention_falls_back(
    const array& q,
    const array& k,
    const array& v,
    bool has_mask,
    bool array_mask,
    bool causal,
    bool sinks,
    bool training,
    bool logsumexp,
    bool force_fused,
    Stream s) {
  Attention a{
      q.shape(1) / k.shape(1), q.shape(2), k.shape(2), q.shape(3), v.shape(3),
      q.dtype() == float16 || q.dtype() == bfloat16, has_mask, array_mask, causal, sinks};
  bool fused = s.device == Device::gpu && !(logsumexp && array_mask) && has_fused_kernel(a);
  if (force_fused) {
    if (!fused)
      throw std::invalid_argument("no fused attention kernel takes these shapes");
    return false;
  }
  bool plain_causal = causal && !array_mask;
  if (a.half && a.q_dim == 512 && a.v_dim == 512 && a.L >= 1024 && a.L <= a.S && plain_causal &&
      !sinks && !logsumexp)
    return false;
  if (logsumexp || !fused)
    return !fused;
  if (causal && a.half && a.q_dim == 256 && a.L >= 2048 && a.L == a.S)
    return false;
  if (a.L > 8)
    return a.q_dim == 192 || a.q_dim == 256;
  return a.q_dim == a.v_dim && a.q_dim == 192;
}

const char* name_of(Dtype dtype) {
  switch (dtype.val()) {
    case Dtype::Val::bool_: return "bool";
    case Dtype::Val::uint8: return "uint8";
    case Dtype::Val::uint16: return "uint16";
    case Dtype::Val::uint32: return "uint32";
    case Dtype::Val::uint64: return "uint64";
    case Dtype::Val::int8: return "int8";
    case Dtype::Val::int16: return "int16";
    case Dtype::Val::int32: return "int32";
    case Dtype::Val::int64: return "int64";
    case Dtype::Val::float16: return "float16";
    case Dtype::Val::bfloat16: return "bfloat16";
    case Dtype::Val::float32: return "float32";
    case Dtype::Val::float64: return "float64";
    case Dtype::Val::complex64: return "complex64";
  }
  return "unknown";
}

template <typename Numbers>
void write_list(std::ostream& os, const Numbers& numbers) {
  os << "[";
  const char* comma = "";
  for (auto n : numbers) {
    os << comma << n;
    comma = ",";
  }
  os << "]";
}

// Whether an array has its contents, or will have them without this graph.
bool is_done(const array& a) {
  return !a.has_primitive() || a.status() != array::Status::unscheduled;
}

void write_arrays(std::ostream& os, const std::vector<array>& arrays) {
  os << "[";
  const char* comma = "";
  for (const auto& a : arrays) {
    os << comma << "[" << a.id() << ",\"" << name_of(a.dtype()) << "\",";
    write_list(os, a.shape());
    os << "," << (is_done(a) ? "true" : "false") << "]";
    comma = ",";
  }
  os << "]";
}

// What of a primitive's arguments decides about strides.
void write_arguments(std::ostream& os, const std::string& name, const Primitive& p) {
  if (name == "Transpose") {
    write_list(os, static_cast<const Transpose&>(p).state());
  } else if (name == "ExpandDims") {
    write_list(os, static_cast<const ExpandDims&>(p).state());
  } else if (name == "Squeeze") {
    write_list(os, static_cast<const Squeeze&>(p).state());
  } else if (name == "Slice") {
    write_list(os, std::get<2>(static_cast<const Slice&>(p).state()));
  } else if (name == "RoPE") {
    write_list(os, std::vector<int>{std::get<1>(static_cast<const fast::RoPE&>(p).state())});
  } else {
    os << "[]";
  }
}

bool operations_wanted = true;

// In place of export_to_dot: operations in the order of their evaluation. An array is written as
// [id, dtype, shape, whether it is done].
void write_graph(std::ostream& os, NodeNamer, const std::vector<array>& outputs) {
  std::vector<array> order;
  std::unordered_set<std::uintptr_t> seen;
  std::vector<std::pair<array, bool>> todo;
  for (auto it = outputs.rbegin(); operations_wanted && it != outputs.rend(); ++it)
    todo.emplace_back(*it, false);
  while (!todo.empty()) {
    auto [a, inputs_done] = todo.back();
    todo.pop_back();
    if (is_done(a))
      continue;
    if (inputs_done) {
      order.push_back(a);
      continue;
    }
    if (seen.count(a.id()))
      continue;
    for (const auto& sibling : a.outputs())
      seen.insert(sibling.id());
    todo.emplace_back(a, true);
    const auto& inputs = a.inputs();
    for (auto it = inputs.rbegin(); it != inputs.rend(); ++it)
      todo.emplace_back(*it, false);
  }
  os << "{\"outputs\":";
  write_arrays(os, outputs);
  os << ",\"ops\":[";
  const char* comma = "";
  for (auto& a : order) {
    std::string name = a.primitive().name();
    os << comma << "{\"name\":\"" << name << "\",\"arguments\":";
    write_arguments(os, name, a.primitive());
    os << ",\"inputs\":";
    write_arrays(os, a.inputs());
    os << ",\"outputs\":";
    write_arrays(os, a.outputs());
    os << "}";
    comma = ",\n";
  }
  os << "]}";
}

const std::unordered_map<std::string, void*> replacements{
    {"yes", (void*)yes},
    {"one_device", (void*)one_device},
    {"device_info", (void*)m4_max},
    {"no_stream", (void*)no_stream},
    {"falls_back_on_cpu", (void*)falls_back_on_cpu},
    {"attention_falls_back", (void*)attention_falls_back},
    {"write_graph", (void*)write_graph}};

} // namespace

// Whether graphs are written with their operations, or as their outputs alone.
extern "C" void shim_want_operations(int wanted) {
  operations_wanted = wanted;
}

// Overwrite the function at an address with a jump; 0 where that worked.
extern "C" int shim_replace(std::uintptr_t address, const char* name) {
  auto found = replacements.find(name);
  if (found == replacements.end())
    return 1;
  long page = sysconf(_SC_PAGESIZE);
  auto* start = (void*)(address & ~std::uintptr_t(page - 1));
  if (mprotect(start, 2 * page, PROT_READ | PROT_WRITE | PROT_EXEC) != 0)
    return 2;
  // jmp [rip + 0], and the address that it reads
  unsigned char code[14] = {0xff, 0x25, 0, 0, 0, 0};
  std::memcpy(code + 6, &found->second, 8);
  std::memcpy((void*)address, code, sizeof(code));
  return mprotect(start, 2 * page, PROT_READ | PROT_EXEC) == 0 ? 0 : 3;
}

// The Python module, on plain Python.h: nanobind's internals change with almost every MLX, and its
// types are then not recognised. Where a C++ array lies in its Python object is nanobind's layout of
// an instance, the same from nanobind 2.4 to 3.1 (MLX 0.30.0 to 0.32.4), and checked when the module
// is loaded: an offset behind the object's header, and a bit that says the value lies there itself.
#include <Python.h>

#include <cstring>
#include <exception>

#include "attention.h"
#include "embed.h"
#include "huge_pages.h"
#include "logits.h"
#include "mlx/version.h"
#include "pool.h"
#include "products.h"
#include "quantize.h"
#include "step.h"

namespace {

PyObject *array_type, *zero;
constexpr size_t VALUE_AT = sizeof(PyObject) + 8;

mx::array& array_of(PyObject* object) {
  require(Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(array_type), "not an mx.array");
  return *reinterpret_cast<mx::array*>(reinterpret_cast<char*>(object) + VALUE_AT);
}
Maybe maybe(PyObject* object) { return object == Py_None ? Maybe() : Maybe(array_of(object)); }
float real(PyObject* object) { return float(PyFloat_AsDouble(object)); }
int whole(PyObject* object) { return int(PyLong_AsLong(object)); }
std::vector<int> wholes(PyObject* tuple) {
  std::vector<int> found;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i)
    found.push_back(whole(PyTuple_GetItem(tuple, i)));
  return found;
}

using Args = PyObject* const*;

// A Python object of an array.
PyObject* object_of(mx::array x) {
  PyObject* made = PyObject_CallOneArg(array_type, zero);
  if (made) array_of(made) = std::move(x);
  return made;
}
PyObject* object_of(Arrays arrays) {
  PyObject* made = PyTuple_New(Py_ssize_t(arrays.size()));
  for (size_t i = 0; made && i < arrays.size(); ++i) {
    PyObject* one = object_of(std::move(arrays[i]));
    if (one) PyTuple_SET_ITEM(made, Py_ssize_t(i), one);
    else Py_CLEAR(made);
  }
  return made;
}

// A function of N arguments that returns an array, or some in a tuple.
template <int N, auto F>
PyObject* call(PyObject*, Args arguments, Py_ssize_t n) {
  if (n != N) return PyErr_Format(PyExc_TypeError, "%d arguments, not %d", N, int(n));
  try {
    auto result = F(arguments);
    return PyErr_Occurred() ? nullptr : object_of(std::move(result));
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
}

// x, (w, scales, biases, kind, group, bias), norm, eps, residual, (act, alpha, limit)
struct WeightArgs {
  explicit WeightArgs(PyObject* tuple)
      : scales(maybe(PyTuple_GetItem(tuple, 1))),
        biases(maybe(PyTuple_GetItem(tuple, 2))),
        bias(maybe(PyTuple_GetItem(tuple, 5))),
        weights{array_of(PyTuple_GetItem(tuple, 0)),
                scales,
                biases,
                Kind(whole(PyTuple_GetItem(tuple, 3))),
                whole(PyTuple_GetItem(tuple, 4)),
                bias} {}
  Maybe scales, biases, bias;
  Weights weights;
};
Activation activation_of(PyObject* tuple) {
  return {Act(whole(PyTuple_GetItem(tuple, 0))), real(PyTuple_GetItem(tuple, 1)),
          real(PyTuple_GetItem(tuple, 2))};
}

// (a, b, factor, shift, changes of rows, (first rank, last rank, first column, last column) of parts,
// scales)
struct LowRankArgs {
  explicit LowRankArgs(PyObject* tuple) {
    if (tuple == Py_None) return;
    factor = maybe(PyTuple_GetItem(tuple, 2)), shift = maybe(PyTuple_GetItem(tuple, 3));
    low.emplace(LowRanks{array_of(PyTuple_GetItem(tuple, 0)), array_of(PyTuple_GetItem(tuple, 1)),
                         array_of(PyTuple_GetItem(tuple, 6)), factor, shift,
                         wholes(PyTuple_GetItem(tuple, 4)), {}});
    const auto numbers = wholes(PyTuple_GetItem(tuple, 5));
    for (size_t i = 0; i + 3 < numbers.size(); i += 4)
      low->parts.push_back({numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]});
  }
  Maybe factor, shift;
  MaybeLow low;
};

mx::array py_linear(Args a) {
  WeightArgs weights(a[1]);
  return linear(array_of(a[0]), weights.weights, maybe(a[2]), real(a[3]), maybe(a[4]),
                activation_of(a[5]));
}
mx::array py_changed_linear(Args a) {
  WeightArgs weights(a[1]);
  LowRankArgs low(a[6]);
  return linear(array_of(a[0]), weights.weights, maybe(a[2]), real(a[3]), maybe(a[4]),
                activation_of(a[5]), low.low);
}
mx::array py_experts(Args a) {
  WeightArgs weights(a[1]);
  return experts(array_of(a[0]), weights.weights, array_of(a[2]), activation_of(a[3]));
}
mx::array py_rms_norm(Args a) {
  return rms_norm(array_of(a[0]), maybe(a[1]), real(a[2]), maybe(a[3]));
}
// qkv, frequencies, n_heads, n_kv_heads, offsets, factor, q_norm, k_norm, eps
mx::array py_rotate(Args a) {
  return rotate(array_of(a[0]), array_of(a[1]), {whole(a[2]), whole(a[3]), wholes(a[4]), real(a[5])},
                maybe(a[6]), maybe(a[7]), real(a[8]));
}
// ids, weight, K
mx::array py_embed(Args a) {
  WeightArgs weights(a[1]);
  return embed(array_of(a[0]), weights.weights, whole(a[2]));
}
// x, group, bits
Arrays py_quantize(Args a) { return quantize(array_of(a[0]), whole(a[1]), whole(a[2])); }
mx::array py_largest(Args a) { return largest(array_of(a[0])); }
mx::array py_first_largest(Args a) { return first_largest(array_of(a[0])); }
// q, k, v, scale, cap, causal, mask, sinks
mx::array py_attend(Args a) {
  Maybe mask = maybe(a[6]), sinks = maybe(a[7]);
  return attend(array_of(a[0]), array_of(a[1]), array_of(a[2]),
                Softmax{real(a[3]), real(a[4]), PyObject_IsTrue(a[5]) == 1, mask, sinks});
}
// qkv, frequencies, k, v, n_heads, n_kv_heads, offsets, factor, q_norm, k_norm, eps, columns,
// lengths, starts, scale, cap, sinks
Arrays py_attend_step(Args a) {
  Maybe mask, sinks = maybe(a[16]);
  return attend_step(array_of(a[0]), array_of(a[1]), array_of(a[2]), array_of(a[3]),
                     {whole(a[4]), whole(a[5]), wholes(a[6]), real(a[7])}, maybe(a[8]), maybe(a[9]),
                     real(a[10]), {wholes(a[11]), wholes(a[12]), wholes(a[13])},
                     Softmax{real(a[14]), real(a[15]), false, mask, sinks});
}
// x, up, norm, eps, down, residual, act
mx::array py_gated_mlp(Args a) {
  WeightArgs up(a[1]), down(a[4]);
  return gated_mlp(array_of(a[0]), up.weights, maybe(a[2]), real(a[3]), down.weights, maybe(a[5]),
                   activation_of(a[6]));
}
mx::array py_changed_mlp(Args a) {
  WeightArgs up(a[1]), down(a[4]);
  LowRankArgs of_up(a[7]), of_down(a[8]);
  return gated_mlp(array_of(a[0]), up.weights, maybe(a[2]), real(a[3]), down.weights, maybe(a[5]),
                   activation_of(a[6]), of_up.low, of_down.low);
}
// (codes, scales, biases, bits, group, dim)
CodedKV coded(PyObject* t) {
  return {array_of(PyTuple_GetItem(t, 0)), array_of(PyTuple_GetItem(t, 1)),
          array_of(PyTuple_GetItem(t, 2)), whole(PyTuple_GetItem(t, 3)),
          whole(PyTuple_GetItem(t, 4)),    whole(PyTuple_GetItem(t, 5))};
}
mx::array py_attend_codes(Args a) {
  Maybe mask = maybe(a[6]), sinks = maybe(a[7]);
  return attend(array_of(a[0]), coded(a[1]), coded(a[2]),
                Softmax{real(a[3]), real(a[4]), PyObject_IsTrue(a[5]) == 1, mask, sinks});
}

PyObject* py_use(PyObject*, PyObject* name) {
  const Kernels* found = kernels(name == Py_None ? nullptr : PyUnicode_AsUTF8(name));
  if (!found) return PyErr_Format(PyExc_ValueError, "this machine has no %U", name);
  use(found);
  return PyUnicode_FromString(found->name);
}
PyObject* py_threads(PyObject*, PyObject* n) {
  Pool::get().resize(whole(n));
  return PyLong_FromLong(Pool::get().size());
}

// A list of arrays; of those that are not computed yet nothing is known.
PyObject* py_huge_pages(PyObject*, PyObject* arrays) {
  std::vector<Range> ranges;
  try {
    for (Py_ssize_t i = 0; i < PyList_Size(arrays); ++i) {
      const auto& x = array_of(PyList_GetItem(arrays, i));
      if (!x.is_available()) continue;
      const auto start = reinterpret_cast<uintptr_t>(x.data<char>());
      ranges.push_back({start, start + x.nbytes()});
    }
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  }
  if (PyErr_Occurred()) return nullptr;
  ask_for_huge_pages(std::move(ranges));
  Py_RETURN_NONE;
}

template <class F>
PyCFunction function(F f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef methods[] = {
    {"linear", function(call<6, py_linear>), METH_FASTCALL, nullptr},
    {"changed_linear", function(call<7, py_changed_linear>), METH_FASTCALL, nullptr},
    {"experts", function(call<4, py_experts>), METH_FASTCALL, nullptr},
    {"rms_norm", function(call<4, py_rms_norm>), METH_FASTCALL, nullptr},
    {"rotate", function(call<9, py_rotate>), METH_FASTCALL, nullptr},
    {"attend", function(call<8, py_attend>), METH_FASTCALL, nullptr},
    {"attend_codes", function(call<8, py_attend_codes>), METH_FASTCALL, nullptr},
    {"attend_step", function(call<17, py_attend_step>), METH_FASTCALL, nullptr},
    {"gated_mlp", function(call<7, py_gated_mlp>), METH_FASTCALL, nullptr},
    {"changed_mlp", function(call<9, py_changed_mlp>), METH_FASTCALL, nullptr},
    {"embed", function(call<3, py_embed>), METH_FASTCALL, nullptr},
    {"quantize", function(call<3, py_quantize>), METH_FASTCALL, nullptr},
    {"largest", function(call<1, py_largest>), METH_FASTCALL, nullptr},
    {"first_largest", function(call<1, py_first_largest>), METH_FASTCALL, nullptr},
    {"huge_pages", py_huge_pages, METH_O, nullptr},
    {"use", py_use, METH_O, nullptr},
    {"threads", py_threads, METH_O, nullptr},
    {}};
PyModuleDef module{PyModuleDef_HEAD_INIT, "_mlxkv_cpu", nullptr, -1, methods};

PyObject* fail(const char* why) {
  PyErr_SetString(PyExc_ImportError, why);
  return nullptr;
}

}  // namespace

PyMODINIT_FUNC PyInit__mlxkv_cpu() {
  PyObject* core = PyImport_ImportModule("mlx.core");
  if (!core) return nullptr;
  if (std::strcmp(mx::version(), BUILT_FOR)) return fail("built for another MLX");
  array_type = PyObject_GetAttrString(core, "array");
  zero = PyLong_FromLong(0);
  if (!array_type || !zero) return nullptr;
  PyObject* probe = PyObject_CallOneArg(array_type, zero);
  if (!probe) return nullptr;
  const char* behind = reinterpret_cast<const char*>(probe) + sizeof(PyObject);
  int32_t offset;
  std::memcpy(&offset, behind, sizeof offset);
  const auto size = reinterpret_cast<PyTypeObject*>(array_type)->tp_basicsize;
  const bool known = size >= Py_ssize_t(VALUE_AT + sizeof(mx::array)) &&
                     offset == int32_t(VALUE_AT) && (behind[4] & 4);
  Py_DECREF(probe);
  if (!known) return fail("mx.array is laid out in a way that is not known");
  return PyModule_Create(&module);
}

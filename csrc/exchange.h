// What fastcl._C reads of tensors without torch's headers: addresses and forms through DLPack's C exchange API,
// attributes through their descriptors, each past the lookup by name and without an object for the answer.
#pragma once
#ifdef TORCH_TARGET_VERSION
#undef TORCH_TARGET_VERSION  // torch 2.10-2.12 ship a pybind11 that refuses it
#endif
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

namespace fastcl {

namespace py = pybind11;

// Of DLPack 1.2, which a tensor's type offers as `__dlpack_c_exchange_api__`. The layout is the standard's (dlpack.h);
// major versions may change it.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;

  static constexpr int32_t kCpu = 1;

  int64_t address() const { return reinterpret_cast<int64_t>(data) + static_cast<int64_t>(byte_offset); }
  int64_t numel() const {
    int64_t n = 1;
    for (int32_t d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }
  bool is_contiguous() const {
    int64_t next = 1;
    for (int32_t d = ndim - 1; d >= 0; next *= shape[d--])
      if (shape[d] != 1 && strides[d] != next) return false;
    return true;
  }
  int64_t dtype() const {  // by torch's numbers; -1 for none that a kernel takes
    constexpr struct {
      int code, bits, number;
    } kKnown[] = {{1, 8, 0}, {2, 16, 5}, {2, 32, 6}, {2, 64, 7}, {6, 8, 11}, {4, 16, 15}};
    for (const auto& known : kKnown)
      if (known.code == type_code && known.bits == type_bits && type_lanes == 1) return known.number;
    return -1;
  }
  size_t form_words() const { return 4 + 2 * size_t(ndim); }
  template <class Word>
  void form(const Word& word) const {  // word(x) for each of form_words() numbers: device, dtype, shape, strides
    word(int64_t(device_type));
    word(int64_t(device_id));
    word(int64_t(ndim));
    word(int64_t(type_code) << 8 | type_bits);
    for (int32_t d = 0; d < ndim; ++d) word(shape[d]);
    for (int32_t d = 0; d < ndim; ++d) word(strides[d]);
  }
};

using Borrow = int (*)(void* object, DLTensor* out);  // not 0, and a Python error, for what has no address

struct DLPackExchange {
  uint32_t major, minor;
  const void *older, *allocate, *managed_from_python, *managed_to_python;
  Borrow borrow_from_python;
  const void* current_stream;
};

inline const DLPackExchange* exchange_of(const py::object& api) {  // null where it is none that we know
  constexpr const char* kName = "dlpack_exchange_api";
  if (PyCapsule_IsValid(api.ptr(), kName) == 0) return nullptr;
  const auto* exchange = static_cast<const DLPackExchange*>(PyCapsule_GetPointer(api.ptr(), kName));
  const bool known = exchange->major == 1 && exchange->minor >= 2 && exchange->borrow_from_python != nullptr;
  return known ? exchange : nullptr;
}

inline Borrow borrow_of(const py::object& api) {
  const DLPackExchange* exchange = exchange_of(api);
  if (exchange == nullptr) throw py::value_error("api is not one that can_describe");
  return exchange->borrow_from_python;
}

// What a call of Python's C API has made, or its error.
inline py::object made(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

// Whether a function without arguments says so. Not through pybind's calls, which make a tuple first.
inline bool says_yes(py::handle f) {
  const int truth = PyObject_IsTrue(made(PyObject_CallNoArgs(f.ptr())).ptr());
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

// A number of Python's as a double; false for what is none, and for an integer that no double holds.
inline bool read_number(PyObject* number, double* to) {
  if (!PyFloat_Check(number) && !PyLong_Check(number)) return false;
  *to = PyFloat_AsDouble(number);
  if (*to != -1 || PyErr_Occurred() == nullptr) return true;
  PyErr_Clear();
  return false;
}

inline bool is_exactly_one_of(const py::tuple& types, py::handle object) {
  const auto is = [&](py::handle type) { return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr(); };
  return std::any_of(types.begin(), types.end(), is);
}

// Tensors whose memory holds minus what they say.
class Negation {
 public:
  bool of(py::handle tensor) const {
    return made(PyObject_CallMethodNoArgs(tensor.ptr(), is_neg_.ptr())).ptr() == Py_True;
  }

 private:
  const py::str is_neg_{"is_neg"};
};

// An attribute of tensors that C computes (requires_grad, grad, _version), by its descriptor.
class Attribute {
 public:
  explicit Attribute(const py::object& descriptor) {
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) throw py::type_error("an attribute is not a descriptor");
    const auto* getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
    get_ = getset->get;
    closure_ = getset->closure;
  }
  py::object of(py::handle tensor) const { return made(get_(tensor.ptr(), closure_)); }

 private:
  getter get_;
  void* closure_;
};

void bind_plan(py::module_& m);              // plan.cpp
void bind_direct_calls(py::module_& m);      // direct_calls.cpp
void bind_direct_functions(py::module_& m);  // direct_functions.cpp

}  // namespace fastcl

// fastcl._C: what Python needs to know about the build, and of many tensors at once. Kernels live in libfastcl.so,
// which knows no Python.
#ifdef TORCH_TARGET_VERSION
#undef TORCH_TARGET_VERSION  // torch 2.10-2.12 ship a pybind11 that refuses it
#endif
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#ifndef FASTCL_VERSION
#define FASTCL_VERSION "unknown"
#endif

namespace py = pybind11;

namespace {

bool cpu_has(const char* feature) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const std::string name(feature);
  if (name == "avx2") return __builtin_cpu_supports("avx2");
  if (name == "fma") return __builtin_cpu_supports("fma");
  if (name == "avx512f") return __builtin_cpu_supports("avx512f");
  if (name == "avx512bw") return __builtin_cpu_supports("avx512bw");
  if (name == "avx512vl") return __builtin_cpu_supports("avx512vl");
#endif
  (void)feature;
  return false;
}

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#else
  info["compiler"] = "msvc";
#endif
  info["torch_headers"] = FASTCL_TORCH_HEADERS;
  info["torch_target"] = "2.10";
  py::dict cpu;
  for (const char* feature : {"avx2", "fma", "avx512f", "avx512bw", "avx512vl"}) cpu[feature] = cpu_has(feature);
  info["cpu"] = cpu;
  return info;
}

// Of DLPack 1.2's C exchange API, which a tensor's type offers as `__dlpack_c_exchange_api__`: a tensor at a time,
// without a Python object for any answer. Its layout is the standard's (dlpack.h); major versions may change it.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  const int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchange {
  uint32_t major, minor;
  const void *older, *allocate, *managed_from_python, *managed_to_python;
  int (*borrow_from_python)(void* object, DLTensor* out);
  const void* current_stream;
};

constexpr const char* kExchange = "dlpack_exchange_api";

const DLPackExchange* exchange_of(const py::object& api) {
  return static_cast<const DLPackExchange*>(PyCapsule_GetPointer(api.ptr(), kExchange));
}

bool can_describe(const py::object& api) {
  if (PyCapsule_IsValid(api.ptr(), kExchange) == 0) return false;
  const DLPackExchange* exchange = exchange_of(api);
  return exchange->major == 1 && exchange->minor >= 2 && exchange->borrow_from_python != nullptr;
}

// Whether a tensor requires grad, past the attribute's lookup by name.
class RequiresGrad {
 public:
  explicit RequiresGrad(const py::object& descriptor) {
    if (!Py_IS_TYPE(descriptor.ptr(), &PyGetSetDescr_Type)) throw py::type_error("requires_grad must be a descriptor");
    descriptor_ = reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr());
  }
  bool of(const py::handle tensor) const {
    const auto* get = descriptor_->d_getset;
    const auto found = py::reinterpret_steal<py::object>(get->get(tensor.ptr(), get->closure));
    if (!found) throw py::error_already_set();
    return found.ptr() == Py_True;
  }

 private:
  PyGetSetDescrObject* descriptor_;
};

// Numbers written where a bytes object will hold them.
struct Numbers {
  py::bytes bytes;
  int64_t* to;
  explicit Numbers(size_t n)
      : bytes(py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, Py_ssize_t(n * sizeof(int64_t))))) {
    if (!bytes) throw py::error_already_set();
    to = reinterpret_cast<int64_t*>(PyBytes_AS_STRING(bytes.ptr()));
  }
};

py::tuple describe(const py::object& api, const py::list& tensors) {
  if (!can_describe(api)) throw py::value_error("api is not one that can_describe");
  const auto borrow = exchange_of(api)->borrow_from_python;
  Numbers addresses(tensors.size()), objects(tensors.size());
  std::vector<int64_t> forms(tensors.size() * 12);
  size_t used = 0;
  for (const py::handle tensor : tensors) {
    DLTensor t{};
    if (borrow(tensor.ptr(), &t) != 0) throw py::error_already_set();
    *addresses.to++ = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
    *objects.to++ = reinterpret_cast<int64_t>(tensor.ptr());
    if (used + 4 + 2 * size_t(t.ndim) > forms.size()) forms.resize(2 * forms.size() + 2 * size_t(t.ndim));
    int64_t* form = forms.data() + used;
    *form++ = t.device_type;
    *form++ = t.device_id;
    *form++ = t.ndim;
    *form++ = int64_t(t.type_code) << 8 | t.type_bits;
    for (int32_t d = 0; d < t.ndim; ++d) *form++ = t.shape[d];
    for (int32_t d = 0; d < t.ndim; ++d) *form++ = t.strides[d];
    used += 4 + 2 * size_t(t.ndim);
  }
  return py::make_tuple(addresses.bytes, py::bytes(reinterpret_cast<const char*>(forms.data()), used * sizeof(int64_t)),
                        objects.bytes);
}

// None where a tensor is of no exact type among `types`, or one of the first `n` requires grad.
py::object describe_plain(const py::object& api, const py::list& tensors, const py::tuple& types,
                          const py::object& requires_grad, size_t n) {
  const RequiresGrad tracked(requires_grad);
  for (const py::handle tensor : tensors) {
    const auto is = [&](const py::handle type) {
      return reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == type.ptr();
    };
    if (std::none_of(types.begin(), types.end(), is)) return py::none();
    if (n > 0 && tracked.of(tensor)) return py::none();
    n -= n > 0;
  }
  return describe(api, tensors);
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Build facts of fastcl, and tensors' addresses";
  m.def("build_info", &build_info, "Compiler, torch headers and target, CPU features of this machine.");
  m.def("can_describe", &can_describe, "Whether this is an exchange API that `describe` knows.");
  m.def("describe", &describe,
        "The tensors' addresses as int64; their devices, dtypes, shapes and strides; their ids.");
  m.def("describe_plain", &describe_plain,
        "The same, or None where one is of no exact type among `types`, or one of the first n requires grad.");
}

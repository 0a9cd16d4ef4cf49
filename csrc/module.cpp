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

py::bytes bytes_of(const std::vector<int64_t>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(int64_t)};
}

py::object describe(const py::object& api, const py::list& tensors, const py::tuple& types) {
  if (!can_describe(api)) throw py::value_error("api is not one that can_describe");
  const auto borrow = exchange_of(api)->borrow_from_python;
  std::vector<const void*> known;
  for (const py::handle type : types) known.push_back(type.ptr());
  std::vector<int64_t> addresses, forms, objects;
  addresses.reserve(tensors.size());
  objects.reserve(tensors.size());
  forms.reserve(tensors.size() * 12);
  for (const py::handle tensor : tensors) {
    const void* type = Py_TYPE(tensor.ptr());
    if (!known.empty() && std::find(known.begin(), known.end(), type) == known.end()) return py::none();
    DLTensor t{};
    if (borrow(tensor.ptr(), &t) != 0) throw py::error_already_set();
    addresses.push_back(reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset));
    objects.push_back(reinterpret_cast<int64_t>(tensor.ptr()));
    forms.insert(forms.end(), {t.device_type, t.device_id, t.ndim, int64_t(t.type_code) << 8 | t.type_bits});
    forms.insert(forms.end(), t.shape, t.shape + t.ndim);
    forms.insert(forms.end(), t.strides, t.strides + t.ndim);
  }
  return py::make_tuple(bytes_of(addresses), bytes_of(forms), bytes_of(objects));
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Build facts of fastcl, and tensors' addresses";
  m.def("build_info", &build_info, "Compiler, torch headers and target, CPU features of this machine.");
  m.def("can_describe", &can_describe, "Whether this is an exchange API that `describe` knows.");
  m.def(
      "describe", &describe,
      "The tensors' addresses as int64; their devices, dtypes, shapes and strides; their ids. None where one is of no "
      "exact type among `types`, unless that is empty.");
}

// fastcl._C: what Python needs to know about the build, and of many tensors at once. Kernels live in libfastcl.so,
// which knows no Python.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "exchange.h"

#ifndef FASTCL_VERSION
#define FASTCL_VERSION "unknown"
#endif

namespace fastcl {
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

bool can_describe(const py::object& api) { return exchange_of(api) != nullptr; }

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
  const Borrow borrow = borrow_of(api);
  Numbers addresses(tensors.size()), objects(tensors.size());
  std::vector<int64_t> forms(tensors.size() * 12);
  size_t used = 0;
  for (const py::handle tensor : tensors) {
    DLTensor t{};
    if (borrow(tensor.ptr(), &t) != 0) throw py::error_already_set();
    *addresses.to++ = t.address();
    *objects.to++ = reinterpret_cast<int64_t>(tensor.ptr());
    if (used + t.form_words() > forms.size()) forms.resize(2 * forms.size() + t.form_words());
    t.form([&](int64_t word) { forms[used++] = word; });
  }
  return py::make_tuple(addresses.bytes, py::bytes(reinterpret_cast<const char*>(forms.data()), used * sizeof(int64_t)),
                        objects.bytes);
}

// None where a tensor is of no exact type among `types`, or one of the first `n` requires grad.
py::object describe_plain(const py::object& api, const py::list& tensors, const py::tuple& types,
                          const py::object& requires_grad, size_t n) {
  const Attribute tracked(requires_grad);
  for (const py::handle tensor : tensors) {
    const auto is = [&](const py::handle type) {
      return reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr())) == type.ptr();
    };
    if (std::none_of(types.begin(), types.end(), is)) return py::none();
    if (n > 0 && tracked.of(tensor).ptr() == Py_True) return py::none();
    n -= n > 0;
  }
  return describe(api, tensors);
}

}  // namespace
}  // namespace fastcl

PYBIND11_MODULE(_C, m, fastcl::py::mod_gil_not_used()) {
  using namespace fastcl;
  m.doc() = "Build facts of fastcl, tensors' addresses, and steps by them";
  m.def("build_info", &build_info, "Compiler, torch headers and target, CPU features of this machine.");
  m.def("can_describe", &can_describe, "Whether this is an exchange API that this module knows.");
  m.def(
      "describe_plain", &describe_plain,
      "The tensors' addresses as int64; their devices, dtypes, shapes and strides; their ids. None where one is of no "
      "exact type among `types`, or one of the first n requires grad.");
  bind_plan(m);
}

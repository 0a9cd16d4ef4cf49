// fastcl._C: what Python needs to know about the build, and what is too much for it between two kernels. These live in
// libfastcl.so, which knows no Python.
#include <string>

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

}  // namespace
}  // namespace fastcl

PYBIND11_MODULE(_C, m, fastcl::py::mod_gil_not_used()) {
  using namespace fastcl;
  m.doc() = "Build facts of fastcl, and calls of its kernels by tensors' addresses";
  m.def("build_info", &build_info, "Compiler, torch headers and target, CPU features of this machine.");
  m.def("can_describe", &can_describe, "Whether this is an exchange API that this module knows.");
  bind_direct_calls(m);
  bind_direct_functions(m);
  bind_plan(m);
}

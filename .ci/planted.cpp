// Bugs for `.ci/sanitize`, which copies this file beside the kernels of its own build and runs each: a sanitizer that
// does not report them cannot see. They go through simd<> and par_for as the kernels do. No other build has this file.
#include <cstring>

#include "cpu.h"

namespace fastcl {

namespace {

enum Kind : int64_t { clean, read_past_end, write_past_end, overflow, misaligned, race };

struct Planted {
  static FASTCL_HD void run(float* x, int64_t n, int64_t kind) {
    for (int64_t i = 0; i < n + (kind == write_past_end); ++i) x[i] += 1;
    if (kind == read_past_end) x[0] += x[n];
    if (kind == overflow) {
      int32_t count = INT32_MAX;
      std::memcpy(x, &count, sizeof count);  // so that the compiler does not know the sum
      std::memcpy(&count, x, sizeof count);
      x[1] = static_cast<float>(count + static_cast<int32_t>(n));
    }
    if (kind == misaligned) x[0] += *reinterpret_cast<const float*>(reinterpret_cast<const char*>(x) + 1);
  }
};

void planted(Tensor x, int64_t kind) {
  float* data = static_cast<float*>(x.mutable_data_ptr());
  const int64_t n = x.numel();
  simd<Planted>(data, n, kind);
  float sum = 0;
  for_elements(n, [&](int64_t begin, int64_t) {
    if (kind == race) sum += data[begin];
    data[begin] += 1;
  });
  data[0] += sum;
}

}  // namespace

STABLE_TORCH_LIBRARY(fastcl_planted, m) { m.def("run(Tensor(a!) x, int kind) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fastcl_planted, CPU, m) { m.impl("run", TORCH_BOX(&planted)); }

}  // namespace fastcl

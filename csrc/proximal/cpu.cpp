#include "../common/cpu.h"

#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "soft_threshold_";

template <class T>
struct SoftThreshold {
  static FASTCL_HD void run(T* w, double threshold, int64_t n) {
    const auto t = static_cast<arithmetic_t<T>>(threshold);
    for (int64_t i = 0; i < n; ++i) store(w + i, soft_threshold(load(w + i), t));
  }
};

void soft_threshold_(const Tensors& tensors, double threshold) {
  FASTCL_CHECK(threshold >= 0, kOp, ": threshold is ", threshold, " but must not be negative or NaN");
  VirtualArray all;
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_output(tensors[i], kOp, item("tensors", i));
    dispatch_float(tensors[i].scalar_type(), kOp, item("tensors", i), [](auto) {});
    all.add(tensors[i].numel());
  }
  check_distinct(tensors, {}, kOp, "tensors", {});
  Addresses outputs = Addresses::outputs(tensors);
  all.for_each([&](size_t i, int64_t begin, int64_t end, int64_t) {
    dispatch_float(outputs.dtype(i), kOp, "tensors", [&](auto type) {
      using T = decltype(type);
      simd<SoftThreshold<T>>(outputs.at<T>(i, begin), threshold, end - begin);
    });
  });
  outputs.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("soft_threshold_", TORCH_BOX(&soft_threshold_)); }

}  // namespace fastcl

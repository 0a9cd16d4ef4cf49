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

void soft_threshold_(Tensors tensors, double threshold) {
  FASTCL_CHECK(threshold >= 0, kOp, ": threshold is ", threshold, " but must not be negative or NaN");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_output(tensors[i], kOp, item("tensors", i));
    dispatch_float(tensors[i].scalar_type(), kOp, item("tensors", i), [](auto) {});
  }
  check_distinct(tensors, {}, kOp, "tensors", {});
  std::vector<Output> outputs;
  outputs.reserve(tensors.size());
  VirtualArray all;
  for (const Tensor& t : tensors) {
    outputs.emplace_back(t);
    all.add(t.numel());
  }
  all.for_each([&](size_t i, int64_t begin, int64_t end, int64_t) {
    const Tensor& t = outputs[i].tensor();
    dispatch_float(t.scalar_type(), kOp, "tensors", [&](auto type) {
      using T = decltype(type);
      simd<SoftThreshold<T>>(static_cast<T*>(t.mutable_data_ptr()) + begin, threshold, end - begin);
    });
  });
  for (auto& output : outputs) output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("soft_threshold_", TORCH_BOX(&soft_threshold_)); }

}  // namespace fastcl

#include "../common/masks.h"
#include "forms.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "masked_grad_";

template <class T, class M>
struct MaskedGrad {
  static FASTCL_HD void run(T* FASTCL_RESTRICT g, const M* FASTCL_RESTRICT r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(g + i, masked_grad(load(g + i), static_cast<arithmetic_t<T>>(load(r + i))));
  }
};
template <class T>
struct MaskedGrad<T, uint8_t> {
  static FASTCL_HD void run(T* FASTCL_RESTRICT g, const uint8_t* FASTCL_RESTRICT r, int64_t n) {
    int64_t at = 0;
    for (; at + kAlike <= n; at += kAlike) {
      const Alike block = alike(r + at);
      if (block == Alike::reserved) std::memset(g + at, 0, kAlike * sizeof(T));
      if (block == Alike::no)
        for (int64_t i = at; i < at + kAlike; ++i) store(g + i, masked_grad_bits(load(g + i), r[i]));
    }
    for (int64_t i = at; i < n; ++i) store(g + i, masked_grad_bits(load(g + i), r[i]));
  }
};

void check_range(const Addresses& reserved, const VirtualArray& all) {
  std::vector<int64_t> bad(all.chunks(), -1);
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
    if (reserved.dtype(t) == ScalarType::Bool) return;
    dispatch_float(reserved.dtype(t), kOp, "reserved", [&](auto type) {
      using M = decltype(type);
      if (!simd<AllInUnitInterval<M>>(reserved.at<const M>(t, begin), end - begin))
        bad[chunk] = static_cast<int64_t>(t);
    });
  });
  for (int64_t t : bad)
    FASTCL_CHECK(t < 0, kOp, ": ", item("reserved", static_cast<size_t>(t)), " has values outside [0, 1] or NaN");
}

void masked_grad_(const Tensors& grads, const Tensors& reserved) {
  for (const Tensor& r : reserved)
    if (r.scalar_type() == ScalarType::Byte) return masked_grad_any(kOp, grads, reserved, {});
  check_lengths(reserved.size(), grads.size(), kOp, "reserved", "grads");
  bool any_float = false;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_output(grads[i], kOp, item("grads", i));
    dispatch_float(grads[i].scalar_type(), kOp, item("grads", i), [](auto) {});
    check_like(reserved[i], grads[i], kOp, item("reserved", i), item("grads", i));
    const ScalarType mask = reserved[i].scalar_type();
    any_float |= mask != ScalarType::Bool;
    FASTCL_CHECK(mask == ScalarType::Bool || is_floating(mask), kOp, ": ", item("reserved", i),
                 " must be bool, float32, float64, bfloat16 or float16 (or uint8: packed bits)");
  }
  check_distinct(grads, {&reserved}, kOp, "grads", {"reserved"});

  Addresses outputs = Addresses::outputs(grads);
  const Addresses masks = Addresses::inputs(reserved, outputs);
  VirtualArray all;
  for (const Tensor& g : grads) all.add(g.numel());
  if (any_float) check_range(masks, all);
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    dispatch_float(outputs.dtype(t), kOp, "grads", [&](auto type) {
      using T = decltype(type);
      T* g = outputs.at<T>(t, begin);
      if (masks.dtype(t) == ScalarType::Bool) {
        simd<MaskedGrad<T, uint8_t>>(g, masks.at<const uint8_t>(t, begin), end - begin);
        return;
      }
      dispatch_float(masks.dtype(t), kOp, "reserved", [&](auto mask_type) {
        using M = decltype(mask_type);
        simd<MaskedGrad<T, M>>(g, masks.at<const M>(t, begin), end - begin);
      });
    });
  });
  outputs.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("masked_grad_", TORCH_BOX(&masked_grad_)); }

}  // namespace fastcl

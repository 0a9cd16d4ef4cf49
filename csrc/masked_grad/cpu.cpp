#include "../common/direct.h"
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
      if (block != Alike::no) continue;
      write_ahead<kAlike>(g + at);
      for (int64_t i = at; i < at + kAlike; ++i) store(g + i, masked_grad_bits(load(g + i), r[i]));
    }
    for (int64_t i = at; i < n; ++i) store(g + i, masked_grad_bits(load(g + i), r[i]));
  }
};

// The first mask with values outside [0, 1] or NaN, or -1.
int64_t out_of_range(const Addresses& reserved, const VirtualArray& all) {
  std::vector<int64_t> bad(all.chunks(), -1);
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
    if (!is_floating(reserved.dtype(t))) return;
    dispatch_float(reserved.dtype(t), kOp, "reserved", [&](auto type) {
      using M = decltype(type);
      if (!simd<AllInUnitInterval<M>>(reserved.at<const M>(t, begin), end - begin))
        bad[chunk] = static_cast<int64_t>(t);
    });
  });
  for (int64_t t : bad)
    if (t >= 0) return t;
  return -1;
}

void multiply(const Addresses& grads, const Addresses& masks, const VirtualArray& all) {
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    dispatch_float(grads.dtype(t), kOp, "grads", [&](auto type) {
      using T = decltype(type);
      T* g = grads.at<T>(t, begin);
      const ScalarType mask = masks.dtype(t);
      if (mask == ScalarType::Bool)
        return simd<MaskedGrad<T, uint8_t>>(g, masks.at<const uint8_t>(t, begin), end - begin);
      if (mask == ScalarType::Byte)
        return simd<ShareGradient<T>>(g, MaskView{MaskKind::packed, masks.at<const uint8_t>(t, 0)}, begin, end - begin);
      dispatch_float(mask, kOp, "reserved", [&](auto mask_type) {
        using M = decltype(mask_type);
        simd<MaskedGrad<T, M>>(g, masks.at<const M>(t, begin), end - begin);
      });
    });
  });
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
  if (any_float)
    if (const int64_t bad = out_of_range(masks, all); bad >= 0)
      fail(kOp, ": ", item("reserved", static_cast<size_t>(bad)), " has values outside [0, 1] or NaN");
  multiply(outputs, masks, all);
  outputs.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("masked_grad_", TORCH_BOX(&masked_grad_)); }

}  // namespace fastcl

extern "C" FASTCL_EXPORT int64_t direct_masked_grad_(const int64_t* addresses, const fastcl::DirectLists* lists,
                                                     int64_t same) {
  using namespace fastcl;
  const Direct direct(addresses, *lists, same);
  if (!direct.apart()) return 1;
  const Addresses grads = direct.list(0), masks = direct.list(1);
  const VirtualArray all = direct.elements();
  bool any_float = false;
  for (size_t i = 0; i < direct.size(); ++i) any_float |= is_floating(masks.dtype(i));
  if (any_float && out_of_range(masks, all) >= 0) return 1;
  multiply(grads, masks, all);
  return 0;
}

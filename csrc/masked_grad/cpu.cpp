#include "../common/cpu.h"

#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "masked_grad_";

template <class T, class M>
struct MaskedGrad {
  static FASTCL_HD void run(T* FASTCL_RESTRICT g, const M* FASTCL_RESTRICT r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(g + i, masked_grad(load(g + i), load(r + i)));
  }
};
template <class T>
struct MaskedGrad<T, uint8_t> {
  static FASTCL_HD void run(T* FASTCL_RESTRICT g, const uint8_t* FASTCL_RESTRICT r, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(g + i, masked_grad(load(g + i), r[i]));
  }
};

template <class M>
struct AllInUnitInterval {  // false for NaN too
  static FASTCL_HD bool run(const M* r, int64_t n) {
    int32_t bad = 0;  // counted, not and-ed: gcc vectorises this
    for (int64_t i = 0; i < n; ++i) {
      const auto x = load(r + i);
      bad += !(x >= 0) + !(x <= 1);
    }
    return bad == 0;
  }
};

void check_range(const Tensors& reserved, const VirtualArray& all) {
  std::vector<char> bad(all.chunks(), 0);
  std::vector<size_t> culprit(all.chunks(), 0);
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
    if (reserved[t].scalar_type() == ScalarType::Bool || bad[chunk]) return;
    dispatch_float(reserved[t].scalar_type(), kOp, item("reserved", t), [&](auto type) {
      using M = decltype(type);
      if (!simd<AllInUnitInterval<M>>(static_cast<const M*>(reserved[t].const_data_ptr()) + begin, end - begin)) {
        bad[chunk] = 1;
        culprit[chunk] = t;
      }
    });
  });
  for (size_t c = 0; c < bad.size(); ++c)
    FASTCL_CHECK(!bad[c], kOp, ": ", item("reserved", culprit[c]), " has values outside [0, 1] or NaN");
}

void masked_grad_(Tensors grads, Tensors reserved) {
  check_lengths(reserved.size(), grads.size(), kOp, "reserved", "grads");
  bool any_float = false;
  for (size_t i = 0; i < grads.size(); ++i) {
    check_output(grads[i], kOp, item("grads", i));
    dispatch_float(grads[i].scalar_type(), kOp, item("grads", i), [](auto) {});
    check_like(reserved[i], grads[i], kOp, item("reserved", i), item("grads", i));
    if (reserved[i].scalar_type() != ScalarType::Bool) {
      any_float = true;
      FASTCL_CHECK(is_floating(reserved[i].scalar_type()), kOp, ": ", item("reserved", i),
                   " must be bool, float32, float64, bfloat16 or float16");
    }
  }
  check_distinct(grads, {&reserved}, kOp, "grads", {"reserved"});

  std::vector<Output> outputs;
  outputs.reserve(grads.size());
  VirtualArray all;
  for (size_t i = 0; i < grads.size(); ++i) {
    outputs.emplace_back(grads[i]);
    reserved[i] = in_layout_of(reserved[i], outputs[i].tensor());
    all.add(grads[i].numel());
  }
  if (any_float) check_range(reserved, all);
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    const Tensor& grad = outputs[t].tensor();
    dispatch_float(grad.scalar_type(), kOp, "grads", [&](auto type) {
      using T = decltype(type);
      T* g = static_cast<T*>(grad.mutable_data_ptr()) + begin;
      if (reserved[t].scalar_type() == ScalarType::Bool) {
        simd<MaskedGrad<T, uint8_t>>(g, static_cast<const uint8_t*>(reserved[t].const_data_ptr()) + begin, end - begin);
        return;
      }
      dispatch_float(reserved[t].scalar_type(), kOp, "reserved", [&](auto mask_type) {
        using M = decltype(mask_type);
        simd<MaskedGrad<T, M>>(g, static_cast<const M*>(reserved[t].const_data_ptr()) + begin, end - begin);
      });
    });
  });
  for (auto& output : outputs) output.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("masked_grad_", TORCH_BOX(&masked_grad_)); }

}  // namespace fastcl

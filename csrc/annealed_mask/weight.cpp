// W o sigmoid(s e), with an embedding for every weight or for every unit: one pass forward, one pass back.
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/masks.h"
#include "math.h"
#include "sixteen.h"
#include "units.h"

namespace fastcl {
namespace {

// out = w o m; with `kept`, the sum of m (1 - r) is returned (eq. 5's numerator).
template <class T, bool kKept>
struct MaskedWeight {
  using A = arithmetic_t<T>;
  static FASTCL_HD double run(T* FASTCL_RESTRICT out, const T* FASTCL_RESTRICT w, const T* FASTCL_RESTRICT e,
                              MaskView reserved, double scale, int64_t begin, int64_t n) {
    const A s = static_cast<A>(scale);
    double lane[kLanes] = {};
    alignas(64) A free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      if constexpr (kKept)
        if (at == 0 || reserved.kind != MaskKind::none) free_shares(free, reserved, begin + at, m);
      const auto one = [&](int64_t i, int l) FASTCL_LAMBDA_HD {
        const A mask = annealed_mask(load(e + at + i), s);
        store(out + at + i, load(w + at + i) * mask);
        if constexpr (kKept) lane[l] += mask * free[i];
      };
      int64_t i = 0;
      for (; i + kLanes <= m; i += kLanes) {
        read_ahead<kLanes>(w + at + i);
        read_ahead<kLanes>(e + at + i);
        write_ahead<kLanes>(out + at + i);
        for (int l = 0; l < kLanes; ++l) one(i + l, l);
      }
      for (; i < m; ++i) one(i, static_cast<int>(i % kLanes));
    }
    return sum_lanes(lane);
  }
};

// gw = g m (1 - r), ge = (g w + gk (1 - r)) dm/de. Without a mask nothing is expanded and 1 - r is the constant 1.
template <class T, Compensation kind, bool kReserved>
struct MaskedWeightBackward {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* gw, T* ge, const T* g, const T* w, const T* e, MaskView reserved, double scale,
                            double s_max, double grad_kept, int64_t begin, int64_t n) {
    const A s = static_cast<A>(scale), top = static_cast<A>(s_max), gk = static_cast<A>(grad_kept);
    if constexpr (!kReserved) return block(gw, ge, g, w, e, nullptr, s, top, gk, n);
    alignas(64) A free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      free_shares(free, reserved, begin + at, m);
      block(gw + at, ge + at, g + at, w + at, e + at, free, s, top, gk, m);
    }
  }
  // All loads before the stores: big arrays begin at the same place in their pages (4 KiB aliasing).
  static FASTCL_HD void block(T* gw, T* ge, const T* g, const T* w, const T* e, const A* free, const A s, const A top,
                              const A gk, int64_t n) {
    const auto some = [&](int64_t first, int64_t last) FASTCL_LAMBDA_HD {
      FASTCL_INDEPENDENT
      for (int64_t i = first; i < last; ++i) {
        const A x = load(e + i), grad = load(g + i), weight = load(w + i), share = kReserved ? free[i] : A(1);
        MaskAndSlope<A> both = annealed_mask_and_slope(x, s);
        if constexpr (kind != Compensation::none) both.slope = mask_slope<kind>(x, s, top);
        const A to_w = kReserved ? free_part(grad * both.mask, share) : grad * both.mask;
        const A to_e = (grad * weight + gk * share) * both.slope;
        store(gw + i, to_w);
        store(ge + i, to_e);
      }
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      read_ahead<kLanes>(g + i);
      read_ahead<kLanes>(w + i);
      read_ahead<kLanes>(e + i);
      write_ahead<kLanes>(gw + i);
      write_ahead<kLanes>(ge + i);
      some(i, i + kLanes);
    }
    some(i, n);
  }
};

// A piece of the weight, whose first element is the begin-th.
template <bool kKept, class T>
double forward_piece(T* out, const T* w, const T* e, const MaskView& reserved, double scale, int64_t begin, int64_t n) {
#ifdef FASTCL_X86
  if constexpr (std::is_same_v<T, float>) {
    double sum = 0;
    const auto sixteen = [&](auto kind) {
      const auto* bits = static_cast<const uint8_t*>(reserved.data);
      sum = masked_weight_avx512<decltype(kind)::value, kKept>(out, w, e, bits, float(scale), begin, n);
    };
    if (isa() == Isa::avx512 && dispatch_bits(reserved.kind, sixteen)) return sum;
  }
#endif
  return simd<MaskedWeight<T, kKept>>(out, w, e, reserved, scale, begin, n);
}

constexpr int64_t kStreamed = int64_t(32) << 20;  // bytes of a gradient

template <Compensation kind, class T>
void backward_piece(T* gw, T* ge, const T* g, const T* w, const T* e, const MaskView& reserved, double scale,
                    double s_max, double grad_kept, int64_t begin, int64_t n, bool streamed) {
#ifdef FASTCL_X86
  if constexpr (std::is_same_v<T, float> && kind != Compensation::literal) {
    const float top = kind == Compensation::none ? 0.f : float(s_max);
    const auto sixteen = [&](auto of_mask) {
      masked_weight_backward_avx512<decltype(of_mask)::value>(gw, ge, g, w, e,
                                                              static_cast<const uint8_t*>(reserved.data), float(scale),
                                                              top, float(grad_kept), begin, n, streamed);
    };
    if (isa() == Isa::avx512 && dispatch_bits(reserved.kind, sixteen)) return;
  }
#endif
  if (reserved.kind == MaskKind::none)
    return simd<MaskedWeightBackward<T, kind, false>>(gw, ge, g, w, e, reserved, scale, s_max, grad_kept, begin, n);
  simd<MaskedWeightBackward<T, kind, true>>(gw, ge, g, w, e, reserved, scale, s_max, grad_kept, begin, n);
}

void check_scales(const char* op, double scale, double s_max, int64_t compensation) {
  FASTCL_CHECK(std::isfinite(scale) && scale >= 0, op, ": scale is ", scale, " but must be finite and not negative");
  FASTCL_CHECK(compensation >= 0 && compensation <= 2, op, ": compensation is ", compensation,
               " but must be 0 (none), 1 (analytic) or 2 (literal)");
  FASTCL_CHECK(compensation == 0 || (std::isfinite(s_max) && s_max > 0), op, ": s_max is ", s_max,
               " but must be finite and positive for a compensated gradient");
  FASTCL_CHECK(compensation != 2 || scale > 0, op, ": scale is 0 but must be positive for the literal compensation");
}

template <class F>
auto dispatch_compensation(int64_t kind, const F& f) {
  if (kind == 1) return f(std::integral_constant<Compensation, Compensation::analytic>{});
  if (kind == 2) return f(std::integral_constant<Compensation, Compensation::literal>{});
  return f(std::integral_constant<Compensation, Compensation::none>{});
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
}

Units units_of(const Tensor& weight, const Tensor& embedding, const char* op) {
  int64_t dim = -1;
  bool good = embedding.dim() == weight.dim();
  for (int64_t d = 0; good && d < weight.dim(); ++d)
    if (embedding.size(d) != 1) {
      good = dim < 0 && embedding.size(d) == weight.size(d);
      dim = d;
    }
  FASTCL_CHECK(good, op, ": embedding must have the shape of weight, or be 1 in every dimension but one of it");
  Units u;
  if (dim < 0) dim = 0;
  if (weight.dim() == 0) return u;
  for (int64_t d = 0; d < weight.dim(); ++d) (d < dim ? u.before : d == dim ? u.units : u.after) *= weight.size(d);
  if (embedding.numel() == 1 && u.units != 1) u = {1, 1, weight.numel()};
  return u;
}

struct Problem {
  Tensor weight, embedding;
  bool per_unit;
  Units units;

  Problem(const Tensor& w, const Tensor& e, const char* op) : weight(w), embedding(e), per_unit(!same_shape(w, e)) {
    FASTCL_CHECK(w.is_cpu() && e.is_cpu(), op, ": weight and embedding must be CPU tensors");
    dispatch_float(w.scalar_type(), op, "weight", [](auto) {});
    check_same_dtype(e, w, op, "embedding", "weight");
    if (per_unit) {
      units = units_of(w, e, op);
      weight = row_major(weight);
      embedding = row_major(embedding);
    } else {
      weight = without_gaps(weight);
      embedding = in_layout_of(embedding, weight);
    }
  }
};

Mask mask_of(const std::optional<Tensor>& reserved, const Tensor& weight, const char* op) {
  if (!reserved) return Mask();
  Mask mask(*reserved, nullptr, weight, op, "reserved", "weight");
  FASTCL_CHECK(mask.in_unit_interval(), op, ": reserved has values outside [0, 1] or NaN");
  return mask;
}

VirtualArray elements_of(const Tensor& t) {
  VirtualArray all;
  all.add(t.numel());
  return all;
}

Tensor masked_weight(Tensor w, Tensor e, double scale, std::optional<Tensor> reserved, double s_max,
                     int64_t compensation) {
  const char* op = "masked_weight";
  check_scales(op, scale, s_max, compensation);
  const Problem problem(w, e, op);
  if (reserved) mask_of(reserved, problem.weight, op);  // used by backward, refused here
  Tensor out = fresh_like(problem.weight);
  dispatch_float(w.scalar_type(), op, "weight", [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* from = static_cast<const T*>(problem.weight.const_data_ptr());
    const T* embedding = static_cast<const T*>(problem.embedding.const_data_ptr());
    if (!problem.per_unit) {
      elements_of(out).for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
        forward_piece<false>(to + begin, from + begin, embedding + begin, MaskView(), scale, begin, end - begin);
      });
      return;
    }
    scale_units(to, from, embedding, scale, problem.units);
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_weight_kept(Tensor w, Tensor e, double scale, std::optional<Tensor> reserved,
                                              double s_max, int64_t compensation) {
  const char* op = "masked_weight_kept";
  check_scales(op, scale, s_max, compensation);
  const Problem problem(w, e, op);
  FASTCL_CHECK(!problem.per_unit, op, ": embedding must have the shape of weight");
  const Mask mask = mask_of(reserved, problem.weight, op);
  Tensor out = fresh_like(problem.weight);
  const bool wide = w.scalar_type() == ScalarType::Double;
  Tensor kept = fresh({}, wide ? ScalarType::Double : ScalarType::Float);
  const VirtualArray all = elements_of(out);
  std::vector<double> sums(all.chunks(), 0);
  dispatch_float(w.scalar_type(), op, "weight", [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const T* from = static_cast<const T*>(problem.weight.const_data_ptr());
    const T* embedding = static_cast<const T*>(problem.embedding.const_data_ptr());
    all.for_each([&](size_t, int64_t begin, int64_t end, int64_t chunk) {
      sums[chunk] +=
          forward_piece<true>(to + begin, from + begin, embedding + begin, mask.view(), scale, begin, end - begin);
    });
  });
  double total = 0;
  for (double s : sums) total += s;
  if (wide)
    *static_cast<double*>(kept.mutable_data_ptr()) = total;
  else
    *static_cast<float*>(kept.mutable_data_ptr()) = static_cast<float>(total);
  return {out, kept};
}

std::tuple<Tensor, Tensor> masked_weight_backward(Tensor grad, std::optional<Tensor> grad_kept, Tensor w, Tensor e,
                                                  double scale, std::optional<Tensor> reserved, double s_max,
                                                  int64_t compensation) {
  const char* op = "masked_weight_backward";
  check_scales(op, scale, s_max, compensation);
  check_like(grad, w, op, "grad", "weight");
  check_same_dtype(grad, w, op, "grad", "weight");
  const Problem problem(w, e, op);
  FASTCL_CHECK(!grad_kept || !problem.per_unit, op, ": embedding must have the shape of weight");
  const Mask mask = mask_of(reserved, problem.weight, op);
  double gk = 0;
  if (grad_kept) {
    FASTCL_CHECK(grad_kept->is_cpu() && grad_kept->numel() == 1, op, ": grad_kept must be one number on the CPU");
    gk = dispatch_float(grad_kept->scalar_type(), op, "grad_kept", [&](auto type) {
      using T = decltype(type);
      return static_cast<double>(load(static_cast<const T*>(grad_kept->const_data_ptr())));
    });
  }
  Tensor grad_w = fresh_like(problem.weight), grad_e = fresh_like(problem.embedding);
  grad = in_layout_of(grad, grad_w);
  dispatch_float(w.scalar_type(), op, "weight", [&](auto type) {
    using T = decltype(type);
    T* gw = static_cast<T*>(grad_w.mutable_data_ptr());
    T* ge = static_cast<T*>(grad_e.mutable_data_ptr());
    const T* g = static_cast<const T*>(grad.const_data_ptr());
    const T* from = static_cast<const T*>(problem.weight.const_data_ptr());
    const T* embedding = static_cast<const T*>(problem.embedding.const_data_ptr());
    dispatch_compensation(compensation, [&](auto kind_constant) {
      constexpr Compensation kind = decltype(kind_constant)::value;
      if (!problem.per_unit) {
        const bool streamed = grad_w.numel() * int64_t(sizeof(T)) >= kStreamed;
        elements_of(grad_w).for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
          backward_piece<kind>(gw + begin, ge + begin, g + begin, from + begin, embedding + begin, mask.view(), scale,
                               s_max, gk, begin, end - begin, streamed);
        });
        return;
      }
      scale_units_backward<kind>(gw, ge, g, from, embedding, scale, s_max, problem.units);
      if (mask.view().kind != MaskKind::none)
        elements_of(grad_w).for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
          simd<ShareGradient<T>>(gw + begin, mask.view(), begin, end - begin);
        });
    });
  });
  return {grad_w, grad_e};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_kept", TORCH_BOX(&masked_weight_kept));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
}

}  // namespace fastcl

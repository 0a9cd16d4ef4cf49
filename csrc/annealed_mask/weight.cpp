// W o sigmoid(s e), with an embedding for every weight or for every unit: one pass forward, one pass back.
#include <cmath>
#include <optional>
#include <tuple>

#include "../common/direct.h"
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

PlainTensor without_data(const Tensor& t) {
  return {nullptr, t.sizes().data(), t.dim(), t.numel(), static_cast<int64_t>(t.scalar_type())};
}

// Weight and embedding, of one dtype, as a kernel takes them.
struct Operands {
  PlainTensor weight, embedding;
  bool good, per_unit;
  Units units;

  Operands(const PlainTensor& w, const PlainTensor& e)
      : weight(w), embedding(e), good(true), per_unit(!w.has_shape_of(e)) {
    if (per_unit) good = find_units(w, e, &units);
  }
  ScalarType dtype() const { return dtype_of(weight); }
};

struct Problem {
  Tensor weight, embedding;
  Operands operands;

  Problem(const Tensor& w, const Tensor& e, const char* op)
      : weight(w), embedding(e), operands(without_data(w), without_data(e)) {
    FASTCL_CHECK(w.is_cpu() && e.is_cpu(), op, ": weight and embedding must be CPU tensors");
    dispatch_float(w.scalar_type(), op, "weight", [](auto) {});
    check_same_dtype(e, w, op, "embedding", "weight");
    FASTCL_CHECK(operands.good, op,
                 ": embedding must have the shape of weight, or be 1 in every dimension but one of it");
    weight = operands.per_unit ? row_major(weight) : without_gaps(weight);
    embedding = operands.per_unit ? row_major(embedding) : in_layout_of(embedding, weight);
    operands.weight.data = const_cast<void*>(weight.const_data_ptr());
    operands.embedding.data = const_cast<void*>(embedding.const_data_ptr());
  }
};

Mask mask_of(const std::optional<Tensor>& reserved, const Tensor& weight, const char* op) {
  if (!reserved) return Mask();
  Mask mask(*reserved, nullptr, weight, op, "reserved", "weight");
  FASTCL_CHECK(mask.in_unit_interval(), op, ": reserved has values outside [0, 1] or NaN");
  return mask;
}

VirtualArray elements_of(const PlainTensor& t) {
  VirtualArray all;
  all.add(t.numel);
  return all;
}

// ---- what the ops and their entries share; all has been checked ----

void write_weight(void* out, const Operands& o, double scale) {
  dispatch_float(o.dtype(), "masked_weight", "weight", [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out);
    const T *w = static_cast<const T*>(o.weight.data), *e = static_cast<const T*>(o.embedding.data);
    if (o.per_unit) return scale_units(to, w, e, scale, o.units);
    elements_of(o.weight).for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
      forward_piece<false>(to + begin, w + begin, e + begin, MaskView(), scale, begin, end - begin);
    });
  });
}

double write_weight_kept(void* out, const Operands& o, const MaskView& reserved, double scale) {
  const VirtualArray all = elements_of(o.weight);
  std::vector<double> sums(all.chunks(), 0);
  dispatch_float(o.dtype(), "masked_weight_kept", "weight", [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(out);
    const T *w = static_cast<const T*>(o.weight.data), *e = static_cast<const T*>(o.embedding.data);
    all.for_each([&](size_t, int64_t begin, int64_t end, int64_t chunk) {
      sums[chunk] += forward_piece<true>(to + begin, w + begin, e + begin, reserved, scale, begin, end - begin);
    });
  });
  double total = 0;
  for (double s : sums) total += s;
  return total;
}

struct Upstream {
  const void* weight;
  double kept;
};

void write_gradients(void* grad_w, void* grad_e, const Upstream& grad, const Operands& o, const MaskView& reserved,
                     double scale, double s_max, int64_t compensation) {
  dispatch_float(o.dtype(), "masked_weight_backward", "weight", [&](auto type) {
    using T = decltype(type);
    T *gw = static_cast<T*>(grad_w), *ge = static_cast<T*>(grad_e);
    const T *g = static_cast<const T*>(grad.weight), *w = static_cast<const T*>(o.weight.data);
    const T* e = static_cast<const T*>(o.embedding.data);
    dispatch_compensation(compensation, [&](auto kind_constant) {
      constexpr Compensation kind = decltype(kind_constant)::value;
      const VirtualArray all = elements_of(o.weight);
      if (!o.per_unit) {
        const bool streamed = o.weight.numel * int64_t(sizeof(T)) >= kStreamed;
        return all.for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
          backward_piece<kind>(gw + begin, ge + begin, g + begin, w + begin, e + begin, reserved, scale, s_max,
                               grad.kept, begin, end - begin, streamed);
        });
      }
      scale_units_backward<kind>(gw, ge, g, w, e, scale, s_max, o.units);
      if (reserved.kind != MaskKind::none)
        all.for_each([&](size_t, int64_t begin, int64_t end, int64_t) {
          simd<ShareGradient<T>>(gw + begin, reserved, begin, end - begin);
        });
    });
  });
}

// ---- the ops ----

Tensor masked_weight(Tensor w, Tensor e, double scale, std::optional<Tensor> reserved, double s_max,
                     int64_t compensation) {
  const char* op = "masked_weight";
  check_scales(op, scale, s_max, compensation);
  const Problem problem(w, e, op);
  if (reserved) mask_of(reserved, problem.weight, op);  // used by backward, refused here
  Tensor out = fresh_like(problem.weight);
  write_weight(out.mutable_data_ptr(), problem.operands, scale);
  return out;
}

std::tuple<Tensor, Tensor> masked_weight_kept(Tensor w, Tensor e, double scale, std::optional<Tensor> reserved,
                                              double s_max, int64_t compensation) {
  const char* op = "masked_weight_kept";
  check_scales(op, scale, s_max, compensation);
  const Problem problem(w, e, op);
  FASTCL_CHECK(!problem.operands.per_unit, op, ": embedding must have the shape of weight");
  const Mask mask = mask_of(reserved, problem.weight, op);
  Tensor out = fresh_like(problem.weight);
  const bool wide = w.scalar_type() == ScalarType::Double;
  Tensor kept = fresh({}, wide ? ScalarType::Double : ScalarType::Float);
  const double total = write_weight_kept(out.mutable_data_ptr(), problem.operands, mask.view(), scale);
  if (wide)
    *static_cast<double*>(kept.mutable_data_ptr()) = total;
  else
    *static_cast<float*>(kept.mutable_data_ptr()) = static_cast<float>(total);
  return {out, kept};
}

double number_in(ScalarType dtype, const void* data, const char* op, Name name) {
  return dispatch_float(dtype, op, name,
                        [&](auto type) { return static_cast<double>(load(static_cast<const decltype(type)*>(data))); });
}

std::tuple<Tensor, Tensor> masked_weight_backward(Tensor grad, std::optional<Tensor> grad_kept, Tensor w, Tensor e,
                                                  double scale, std::optional<Tensor> reserved, double s_max,
                                                  int64_t compensation) {
  const char* op = "masked_weight_backward";
  check_scales(op, scale, s_max, compensation);
  check_like(grad, w, op, "grad", "weight");
  check_same_dtype(grad, w, op, "grad", "weight");
  const Problem problem(w, e, op);
  FASTCL_CHECK(!grad_kept || !problem.operands.per_unit, op, ": embedding must have the shape of weight");
  const Mask mask = mask_of(reserved, problem.weight, op);
  double gk = 0;
  if (grad_kept) {
    FASTCL_CHECK(grad_kept->is_cpu() && grad_kept->numel() == 1, op, ": grad_kept must be one number on the CPU");
    gk = number_in(grad_kept->scalar_type(), grad_kept->const_data_ptr(), op, "grad_kept");
  }
  Tensor grad_w = fresh_like(problem.weight), grad_e = fresh_like(problem.embedding);
  grad = in_layout_of(grad, grad_w);
  write_gradients(grad_w.mutable_data_ptr(), grad_e.mutable_data_ptr(), {grad.const_data_ptr(), gk}, problem.operands,
                  mask.view(), scale, s_max, compensation);
  return {grad_w, grad_e};
}

// ---- entries for plain tensors (direct.h) ----

struct Numbers {
  double scale, s_max;
  int64_t compensation;
  explicit Numbers(const double* x) : scale(x[0]), s_max(x[1]), compensation(static_cast<int64_t>(x[2])) {}
  bool good() const {
    try {
      check_scales("", scale, s_max, compensation);
    } catch (const std::runtime_error&) {  // the op says it
      return false;
    }
    return true;
  }
};

bool are_good(const Operands& o) { return o.good && is_floating(o.dtype()) && o.weight.dtype == o.embedding.dtype; }

// False for a mask that must be looked at more closely: a float one, bits.
bool view_of(const PlainTensor& reserved, const PlainTensor& weight, MaskView* view) {
  if (reserved.data == nullptr) return true;
  *view = {MaskKind::boolean, reserved.data};
  return dtype_of(reserved) == ScalarType::Bool && reserved.has_shape_of(weight);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("masked_weight", TORCH_BOX(&masked_weight));
  m.impl("masked_weight_kept", TORCH_BOX(&masked_weight_kept));
  m.impl("masked_weight_backward", TORCH_BOX(&masked_weight_backward));
}

}  // namespace fastcl

extern "C" FASTCL_EXPORT int64_t function_masked_weight(const fastcl::PlainTensor* in, const fastcl::PlainTensor* out,
                                                        const double* numbers) {
  using namespace fastcl;
  const Numbers x(numbers);
  const Operands operands(in[0], in[1]);
  MaskView reserved;
  if (!x.good() || !are_good(operands) || !view_of(in[2], in[0], &reserved)) return 1;
  write_weight(out[0].data, operands, x.scale);
  return 0;
}

extern "C" FASTCL_EXPORT int64_t function_masked_weight_kept(const fastcl::PlainTensor* in,
                                                             const fastcl::PlainTensor* out, const double* numbers) {
  using namespace fastcl;
  const Numbers x(numbers);
  const Operands operands(in[0], in[1]);
  MaskView reserved;
  if (!x.good() || !are_good(operands) || !view_of(in[2], in[0], &reserved)) return 1;
  if (operands.per_unit || operands.dtype() == ScalarType::Double) return 1;  // whose sum is no float
  *static_cast<float*>(out[1].data) = static_cast<float>(write_weight_kept(out[0].data, operands, reserved, x.scale));
  return 0;
}

extern "C" FASTCL_EXPORT int64_t function_masked_weight_backward(const fastcl::PlainTensor* in,
                                                                 const fastcl::PlainTensor* out,
                                                                 const double* numbers) {
  using namespace fastcl;
  const PlainTensor &grad = in[0], &grad_kept = in[1];
  const Numbers x(numbers);
  const Operands operands(in[2], in[3]);
  MaskView reserved;
  if (!x.good() || !are_good(operands) || !view_of(in[4], operands.weight, &reserved)) return 1;
  if (!grad.is_like(operands.weight)) return 1;
  double kept = 0;
  if (grad_kept.data != nullptr) {
    if (operands.per_unit || grad_kept.numel != 1 || !is_floating(dtype_of(grad_kept))) return 1;
    kept = number_in(dtype_of(grad_kept), grad_kept.data, "masked_weight_backward", "grad_kept");
  }
  write_gradients(out[0].data, out[1].data, {grad.data, kept}, operands, reserved, x.scale, x.s_max, x.compensation);
  return 0;
}

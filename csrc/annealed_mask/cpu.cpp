#include <cmath>

#include "../common/direct.h"
#include "math.h"
#include "sixteen.h"

namespace fastcl {
namespace {

template <class T>
struct AnnealedMask {
  static FASTCL_HD void run(T* FASTCL_RESTRICT m, const T* FASTCL_RESTRICT e, double scale, int64_t n) {
    const auto s = static_cast<arithmetic_t<T>>(scale);
    for (int64_t i = 0; i < n; ++i) store(m + i, annealed_mask(load(e + i), s));
  }
};

template <class T, Compensation kind>
struct MaskBackward {
  static FASTCL_HD void run(T* FASTCL_RESTRICT ge, const T* FASTCL_RESTRICT gm, const T* FASTCL_RESTRICT e,
                            double scale, double s_max, int64_t n) {
    using A = arithmetic_t<T>;
    const A s = static_cast<A>(scale), top = static_cast<A>(s_max);
    for (int64_t i = 0; i < n; ++i) store(ge + i, load(gm + i) * mask_slope<kind>(load(e + i), s, top));
  }
};

bool is_scale(double scale) { return std::isfinite(scale) && scale >= 0; }

void check_scale(const char* op, double scale) {
  FASTCL_CHECK(is_scale(scale), op, ": scale is ", scale, " but must be finite and not negative");
}

void write_mask(const char* op, void* mask, const void* embedding, ScalarType dtype, double scale, int64_t numel) {
  dispatch_float(dtype, op, "embedding", [&](auto type) {
    using T = decltype(type);
    for_elements(numel, [&](int64_t begin, int64_t n) {
      T* m = static_cast<T*>(mask) + begin;
      const T* e = static_cast<const T*>(embedding) + begin;
#ifdef FASTCL_X86
      if constexpr (std::is_same_v<T, float>)
        if (isa() == Isa::avx512) return annealed_mask_avx512(m, e, float(scale), n);
#endif
      simd<AnnealedMask<T>>(m, e, scale, n);
    });
  });
}

Tensor mask_of(const char* op, Tensor embedding, double scale) {
  check_scale(op, scale);
  FASTCL_CHECK(embedding.is_cpu(), op, ": embedding must be a CPU tensor");
  Tensor mask = fresh_like(embedding);
  embedding = in_layout_of(embedding, mask);
  write_mask(op, mask.mutable_data_ptr(), embedding.const_data_ptr(), embedding.scalar_type(), scale, mask.numel());
  return mask;
}

Tensor annealed_mask_cpu(Tensor embedding, double scale) { return mask_of("annealed_mask", embedding, scale); }

void check_compensation(const char* op, double scale, double s_max, bool literal) {
  FASTCL_CHECK(std::isfinite(s_max) && s_max > 0, op, ": s_max is ", s_max, " but must be finite and positive");
  FASTCL_CHECK(!literal || scale > 0, op, ": scale is 0 but must be positive for the literal compensation");
}

Tensor compensated_mask_cpu(Tensor embedding, double scale, double s_max, bool literal) {
  check_compensation("compensated_mask", scale, s_max, literal);
  return mask_of("compensated_mask", embedding, scale);
}

template <Compensation kind>
void write_gradient(const char* op, void* grad_embedding, const void* grad, const void* embedding, ScalarType dtype,
                    double scale, double s_max, int64_t numel) {
  dispatch_float(dtype, op, "embedding", [&](auto type) {
    using T = decltype(type);
    for_elements(numel, [&](int64_t begin, int64_t n) {
      T* ge = static_cast<T*>(grad_embedding) + begin;
      const T *gm = static_cast<const T*>(grad) + begin, *e = static_cast<const T*>(embedding) + begin;
#ifdef FASTCL_X86
      if constexpr (std::is_same_v<T, float> && kind != Compensation::literal)
        if (isa() == Isa::avx512) {
          const float top = kind == Compensation::none ? 0.f : float(s_max);
          return annealed_mask_backward_avx512(ge, gm, e, float(scale), top, n);
        }
#endif
      simd<MaskBackward<T, kind>>(ge, gm, e, scale, s_max, n);
    });
  });
}

template <Compensation kind>
Tensor mask_backward(const char* op, Tensor grad, Tensor embedding, double scale, double s_max) {
  check_scale(op, scale);
  check_like(grad, embedding, op, "grad", "embedding");
  check_same_dtype(grad, embedding, op, "grad", "embedding");
  Tensor grad_embedding = fresh_like(embedding);
  embedding = in_layout_of(embedding, grad_embedding);
  grad = in_layout_of(grad, grad_embedding);
  write_gradient<kind>(op, grad_embedding.mutable_data_ptr(), grad.const_data_ptr(), embedding.const_data_ptr(),
                       embedding.scalar_type(), scale, s_max, embedding.numel());
  return grad_embedding;
}

Tensor annealed_mask_backward_cpu(Tensor grad, Tensor embedding, double scale) {
  return mask_backward<Compensation::none>("annealed_mask_backward", grad, embedding, scale, 1.0);
}

Tensor compensated_mask_backward_cpu(Tensor grad, Tensor embedding, double scale, double s_max, bool literal) {
  const char* op = "compensated_mask_backward";
  check_compensation(op, scale, s_max, literal);
  return literal ? mask_backward<Compensation::literal>(op, grad, embedding, scale, s_max)
                 : mask_backward<Compensation::analytic>(op, grad, embedding, scale, s_max);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("annealed_mask", TORCH_BOX(&annealed_mask_cpu));
  m.impl("annealed_mask_backward", TORCH_BOX(&annealed_mask_backward_cpu));
  m.impl("compensated_mask", TORCH_BOX(&compensated_mask_cpu));
  m.impl("compensated_mask_backward", TORCH_BOX(&compensated_mask_backward_cpu));
}

}  // namespace fastcl

extern "C" FASTCL_EXPORT int64_t function_annealed_mask(const fastcl::PlainTensor* in, const fastcl::PlainTensor* out,
                                                        const double* numbers) {
  using namespace fastcl;
  if (!is_scale(numbers[0]) || !is_floating(dtype_of(in[0]))) return 1;
  write_mask("annealed_mask", out[0].data, in[0].data, dtype_of(in[0]), numbers[0], in[0].numel);
  return 0;
}

extern "C" FASTCL_EXPORT int64_t function_annealed_mask_backward(const fastcl::PlainTensor* in,
                                                                 const fastcl::PlainTensor* out,
                                                                 const double* numbers) {
  using namespace fastcl;
  if (!is_scale(numbers[0]) || !is_floating(dtype_of(in[1])) || !in[0].is_like(in[1])) return 1;
  write_gradient<Compensation::none>("annealed_mask_backward", out[0].data, in[0].data, in[1].data, dtype_of(in[1]),
                                     numbers[0], 1.0, in[1].numel);
  return 0;
}

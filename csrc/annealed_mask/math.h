// HAT's and DGM's annealed attention mask m = sigmoid(s e) and its derivative in e.
#pragma once
#include "../common/math.h"

namespace fastcl {

// The mask and dm/de = s m (1 - m) from one exponential q = exp(-|s e|), which never overflows: the slope, s q / (1 +
// q)^2, does not vanish where m rounds to 1, and a mask that is all off is 0, not a denormal that slows what it
// multiplies.
template <class T>
struct MaskAndSlope {
  T mask, slope;
};
template <class T>
FASTCL_HD MaskAndSlope<T> annealed_mask_and_slope(T e, T scale) {
  const T x = scale * e, q = exp_not_positive(-abs(x)), inverse = T(1) / (T(1) + q), small = q * inverse;
  return {x < T(0) ? small : inverse, scale * small * inverse};
}

template <class T>
FASTCL_HD T annealed_mask(T e, T scale) {
  return annealed_mask_and_slope(e, scale).mask;
}

template <class T>
FASTCL_HD T annealed_mask_slope(T e, T scale) {
  return annealed_mask_and_slope(e, scale).slope;
}

// HAT's embedding gradient is compensated: (s_max / s) (cosh(s e) + 1) / (cosh(e) + 1) times the true one. Since
// m (1 - m) = 1 / (2 (cosh(s e) + 1)), that is s_max sigmoid'(e): no quotient of huge numbers, nothing that overflows.
template <class T>
FASTCL_HD T compensated_slope(T e, T s_max) {
  return annealed_mask_slope(e, T(1)) * s_max;
}

// The same as the authors' code computes it, for parity: with 1 - m rounded (0 from s e = 17 on in float32) and
// cosh clamped at 50.
template <class T>
FASTCL_HD T literal_slope(T e, T scale, T s_max) {
  const T m = annealed_mask(e, scale);
  T x = abs(scale * e);
  x = x > T(50) ? T(50) : x;
  const T numerator = (exp(x) + exp(-x)) / T(2) + T(1);
  const T denominator = (exp(e) + exp(-e)) / T(2) + T(1);
  return scale * m * (T(1) - m) * (s_max / scale * (numerator / denominator));
}

enum class Compensation { none = 0, analytic = 1, literal = 2 };

template <Compensation kind, class T>
FASTCL_HD T mask_slope(T e, T scale, T s_max) {
  if constexpr (kind == Compensation::analytic) return compensated_slope(e, s_max);
  if constexpr (kind == Compensation::literal) return literal_slope(e, scale, s_max);
  return annealed_mask_slope(e, scale);
}

}  // namespace fastcl

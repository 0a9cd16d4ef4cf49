// HAT's and DGM's annealed attention mask m = sigmoid(s e) and its derivative in e.
#pragma once
#include "../common/math.h"

namespace fastcl {

template <class T>
FASTCL_HD T annealed_mask(T e, T scale) {
  return T(1) / (T(1) + exp(-scale * e));
}

// dm/de = s m (1 - m), written with q = exp(-|s e|) so that it does not vanish where m rounds to 1:
// m (1 - m) = q / (1 + q)^2 is even in e.
template <class T>
FASTCL_HD T annealed_mask_slope(T e, T scale) {
  const T q = exp(-abs(scale * e));
  return scale * q / ((T(1) + q) * (T(1) + q));
}

}  // namespace fastcl

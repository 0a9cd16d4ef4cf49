// Quadratic penalties of EWC, MAS, SI and RWalk, and the per-sample importance |g|^power.
#pragma once
#include "../common/math.h"

namespace fastcl {

// One parameter's share of sum F (p - a)^2; the factor strength / 2 is applied to the sum.
template <class T>
FASTCL_HD T quadratic_term(T p, T anchor, T importance) {
  const T drift = p - anchor;
  return importance * drift * drift;
}

// d/dp of strength / 2 * F (p - a)^2.
template <class T>
FASTCL_HD T quadratic_slope(T p, T anchor, T importance, T strength) {
  return strength * importance * (p - anchor);
}

template <int power, class T>
FASTCL_HD T importance_of(T g) {
  return power == 2 ? g * g : abs(g);
}

}  // namespace fastcl

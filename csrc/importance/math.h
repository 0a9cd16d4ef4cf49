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

// One step's share of SI's path integral: the loss decrease -g dp that this weight's movement explains.
template <class T>
FASTCL_HD T path_term(T g, T moved) {
  return -g * moved;
}

// SI's importance of a task: max(omega, 0) / (distance^2 + xi). NaN stays NaN.
template <class T>
FASTCL_HD T path_importance(T omega, T distance, T xi) {
  return (omega < T(0) ? T(0) : omega) / (distance * distance + xi);
}

// RWalk's Fisher: a moving average of g^2.
template <class T>
FASTCL_HD T moving_square(T fisher, T g, T alpha) {
  return (T(1) - alpha) * fisher + alpha * g * g;
}

// RWalk's score of a window: the gain per distance in the Fisher's metric, where it is a gain.
template <class T>
FASTCL_HD T walk_score(T gain, T fisher, T moved, T epsilon) {
  const T score = gain / (T(0.5) * fisher * moved * moved + epsilon);
  return score < T(0) ? T(0) : score;
}

// F (t - a)^2 + f (t - p)^2 = (F + f) (t - (a + share (p - a)))^2 + F share (p - a)^2, share = f / (F + f).
template <class T>
FASTCL_HD T share_of(T old_importance, T fresh) {
  return old_importance + fresh > T(0) ? fresh / (old_importance + fresh) : T(1);
}

template <int power, class T>
FASTCL_HD T importance_of(T g) {
  return power == 2 ? g * g : abs(g);
}

}  // namespace fastcl

// Proximal steps of DEN's sparsity terms.
#pragma once
#include "../common/math.h"

namespace fastcl {

// prox of t ||w||_1: sign(w) max(|w| - t, 0). NaN stays NaN.
template <class T>
FASTCL_HD T soft_threshold(T w, T threshold) {
  const T shrunk = abs(w) - threshold;
  return shrunk <= T(0) ? T(0) : (w < T(0) ? -shrunk : shrunk);
}

// prox of t ||w_g||_2 scales a whole group: max(1 - t / ||w_g||, 0), 0 for a norm that is not above t.
FASTCL_HD double group_scale(double norm, double threshold) { return norm <= threshold ? 0.0 : 1.0 - threshold / norm; }

}  // namespace fastcl

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

}  // namespace fastcl

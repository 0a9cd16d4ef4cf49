// The gradient of a weight that is partly or wholly reserved for earlier tasks: g (1 - r).
#pragma once
#include "../common/math.h"

namespace fastcl {

// r = 1 protects: the result is 0 even where g is Inf or NaN, which g * (1 - r) would let through.
template <class T>
FASTCL_HD T masked_grad(T g, T r) {
  return r == T(1) ? T(0) : g * (T(1) - r);
}

template <class T>
FASTCL_HD T masked_grad(T g, bool r) {
  return r ? T(0) : g;
}

}  // namespace fastcl

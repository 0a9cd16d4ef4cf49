// The gradient of a weight that is partly or wholly reserved for earlier tasks: g (1 - r).
#pragma once
#include "../common/math.h"

namespace fastcl {

// r = 1 protects: the result is 0 even where g is Inf or NaN, which g * (1 - r) would let through.
template <class T>
FASTCL_HD T masked_grad(T g, T r) {
  return r == T(1) ? T(0) : g * (T(1) - r);
}

// r != 0 protects. By bits, since gcc does not vectorise the choice between a float and 0 by a byte.
FASTCL_HD float masked_grad_bits(float g, uint8_t r) {
  return float_from_bits(float_bits(g) & -static_cast<int32_t>(r == 0));
}

FASTCL_HD double masked_grad_bits(double g, uint8_t r) {
  int64_t bits;
  std::memcpy(&bits, &g, sizeof bits);
  bits &= -static_cast<int64_t>(r == 0);
  std::memcpy(&g, &bits, sizeof bits);
  return g;
}

}  // namespace fastcl

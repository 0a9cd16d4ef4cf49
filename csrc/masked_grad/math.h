// Weights that are partly or wholly reserved for earlier tasks: their gradient g (1 - r), and the steps of the free
// ones.
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

// The steps take gradients up to their sign (-1 to maximize), which their squares do not need and their means fold into
// a product that they have anyway: `decay` is the sign times the weight decay.

// One step of SGD (torch.optim.SGD) on one free weight. `first` starts the momentum buffer with the gradient.
template <class A>
struct Sgd {
  A lr, momentum, one_minus_dampening, decay, sign;
  bool nesterov, first;

  FASTCL_HD A started(A buffer, A g) const { return first ? sign * g : buffered(buffer, g); }
  FASTCL_HD A buffered(A buffer, A g) const { return momentum * buffer + one_minus_dampening * sign * g; }
  FASTCL_HD A direction(A buffer, A g) const { return nesterov ? sign * g + momentum * buffer : buffer; }
  FASTCL_HD A update(A p, A direction) const { return p - lr * direction; }
};

// One step of Adam or, decoupled, AdamW (torch.optim): the bias corrections stand in step_size and root_scale.
template <class A>
struct Adam {
  A one_minus_beta1, beta2, one_minus_beta2, eps, decay, shrink, sign, step_size, root_scale;

  FASTCL_HD A mean(A m, A g) const { return m + one_minus_beta1 * (sign * g - m); }
  FASTCL_HD A square(A v, A g) const { return beta2 * v + one_minus_beta2 * g * g; }
  FASTCL_HD A largest(A seen, A v) const { return v <= seen || seen != seen ? seen : v; }  // NaN stays
  FASTCL_HD A update(A p, A m, A v) const { return p * shrink - step_size * m / (sqrt(v) * root_scale + eps); }
};

}  // namespace fastcl

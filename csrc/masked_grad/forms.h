#pragma once
#include "../common/cpu.h"

namespace fastcl {

// g *= 1 - r for masks in any stored form (common/masks.h); `columns` is empty, or one vector (or empty tensor) a mask.
void masked_grad_any(const char* op, Tensors grads, const Tensors& reserved, const Tensors& columns);

}  // namespace fastcl

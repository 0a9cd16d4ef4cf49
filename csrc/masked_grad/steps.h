// The optimizer steps as plain data: what an op gathers from tensors, and what a cached plan keeps between steps.
#pragma once
#include <cstdint>

#include "../common/export.h"

namespace fastcl {

// One parameter. Every field is eight bytes wide: fastcl/ops/masked_grad/plan.py writes this struct as a row of int64.
struct StepEntry {
  void* param;
  const void* grad;
  void* state[3];  // SGD: momentum buffer. Adam: exp_avg, exp_avg_sq, max_exp_avg_sq. Null where there is none.
  void* step;      // Adam's count, incremented here
  const void* mask;
  const void* inner;
  int64_t kind, row;  // MaskKind and, for two vectors, the length of a memory row
  int64_t numel;
  int64_t dtype;      // 0 float32, 1 float64, 2 bfloat16, 3 float16
  int64_t wide_step;  // the count is float64
  int64_t first;      // SGD: the momentum buffer starts now
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay;
  int64_t nesterov, maximize;
};

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t decoupled, maximize;
};

}  // namespace fastcl

// No checks: the caller has validated addresses, dtypes and masks. Never throws but for want of memory.
extern "C" {
FASTCL_EXPORT void masked_sgd_entries(const fastcl::StepEntry* entries, int64_t n, const fastcl::SgdOptions* options);
FASTCL_EXPORT void masked_adam_entries(const fastcl::StepEntry* entries, int64_t n, const fastcl::AdamOptions* options);
}

// What an entry `function_NAME` (direct.h) is told of its tensors, all CPU and contiguous. Known without torch.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fastcl {

struct PlainTensor {
  void* data;  // null for one that is not given
  const int64_t* sizes;
  int64_t dim, numel, dtype;  // dtype by torch's numbers

  bool has_shape_of(const PlainTensor& t) const { return dim == t.dim && std::equal(sizes, sizes + dim, t.sizes); }
  bool is_like(const PlainTensor& t) const { return dtype == t.dtype && has_shape_of(t); }
};

}  // namespace fastcl

// What an entry for direct calls (direct.h) is told of its lists, beside their addresses. Known without torch.
#pragma once
#include <cstdint>

namespace fastcl {

struct DirectLists {
  int64_t n, lists, mutated;
  const int64_t *numels, *dtypes;  // [lists][n]; dtypes by torch's numbers
};

}  // namespace fastcl

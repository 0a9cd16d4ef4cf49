#include "direct.h"

#include "ranges.h"

namespace fastcl {

bool Direct::are_apart() const {
  const int64_t written = lists_.mutated * lists_.n, all = lists_.lists * lists_.n;
  const auto range = [&](int64_t i) {
    const char* begin = reinterpret_cast<const char*>(addresses_[i]);
    const auto dtype = static_cast<ScalarType>(lists_.dtypes[i]);
    return Range{begin, begin + lists_.numels[i] * static_cast<int64_t>(element_size(dtype))};
  };
  for (int64_t i = 0; i < all; ++i)
    if (addresses_[i] == 0 && lists_.numels[i] > 0) return false;  // a storage that was freed
  Written mutated;
  for (int64_t i = 0; i < written; ++i) mutated.add(range(i), static_cast<size_t>(i));
  mutated.sort();
  if (mutated.overlap()) return false;
  for (int64_t i = written; i < all; ++i)
    if (mutated.overlap(range(i))) return false;
  return true;
}

}  // namespace fastcl

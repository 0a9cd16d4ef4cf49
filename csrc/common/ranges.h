// Which of a call's tensors share memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

namespace fastcl {

struct Range {
  const char *begin, *end;
};

// What a call writes. Sorted by address, an overlap shows between neighbours: O(n log n), not O(n^2).
class Written {
 public:
  void add(Range range, size_t number) {
    if (range.begin != range.end) ranges_.push_back({range, number});
  }
  void sort() {
    const auto less = [](const Entry& a, const Entry& b) { return a.first.begin < b.first.begin; };
    std::sort(ranges_.begin(), ranges_.end(), less);
  }

  // The numbers of two that share memory, the one behind first.
  std::optional<std::pair<size_t, size_t>> overlap() const {
    for (size_t k = 1; k < ranges_.size(); ++k)
      if (ranges_[k - 1].first.end > ranges_[k].first.begin)
        return std::make_pair(ranges_[k].second, ranges_[k - 1].second);
    return std::nullopt;
  }
  // The number of one that shares memory with `read`.
  std::optional<size_t> overlap(Range read) const {
    if (read.begin == read.end) return std::nullopt;
    auto after = std::upper_bound(ranges_.begin(), ranges_.end(), read.end - 1,
                                  [](const char* p, const Entry& entry) { return p < entry.first.begin; });
    if (after == ranges_.begin()) return std::nullopt;
    --after;
    return after->first.end > read.begin ? std::optional<size_t>(after->second) : std::nullopt;
  }

 private:
  using Entry = std::pair<Range, size_t>;
  std::vector<Entry> ranges_;
};

}  // namespace fastcl

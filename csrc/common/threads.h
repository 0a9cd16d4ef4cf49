// Loops on several threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#ifdef FASTCL_STD_THREADS
#include "std_threads.h"
#endif

namespace fastcl {

// f(first, last), once a thread.
template <class F>
void par_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (end <= begin) return;
#ifdef FASTCL_SMALL_GRAIN  // sanitizer builds: the tests' small sizes split too
  grain = 1;
#endif
#ifdef FASTCL_STD_THREADS
  std_threads_for(begin, end, grain, f);
#else
  if (end - begin <= grain) return f(begin, end);
  torch::stable::parallel_for(begin, end, grain, f);
#endif
}

// f(i) for every i below n. Each thread goes through a part of its own, the same one every time, whose memory its
// caches may still hold; one that is done helps the others: a core that somebody slows delays the rest by one f at
// most.
template <class F>
void par_each(int64_t n, const F& f) {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t count = std::min<int64_t>(n, torch::stable::get_num_threads());
  std::vector<Part> parts(count);
  for (int64_t p = 0; p < count; ++p) {
    parts[p].next.store(n * p / count, std::memory_order_relaxed);
    parts[p].end = n * (p + 1) / count;
  }
  par_for(0, count, 1, [&](int64_t first, int64_t) {
    for (int64_t p = 0; p < count; ++p) {
      Part& part = parts[(first + p) % count];
      for (int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) f(i);
    }
  });
}

}  // namespace fastcl

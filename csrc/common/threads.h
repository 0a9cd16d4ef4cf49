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

inline int64_t most_threads() {
#ifdef FASTCL_STD_THREADS
  return kStdThreads;
#else
  return torch::stable::get_num_threads();
#endif
}

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

// Tasks 0 ... n - 1, a part of them in order for each thread, the same one every time: its caches may still hold what
// they read. A thread that is done helps the others: a core that somebody slows delays all by one task at most.
class Tasks {
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Part> parts_;

 public:
  Tasks(int64_t n, int64_t parts) : parts_(parts) {
    for (int64_t p = 0; p < parts; ++p) {
      parts_[p].next.store(n * p / parts, std::memory_order_relaxed);
      parts_[p].end = n * (p + 1) / parts;
    }
  }

  class Share {  // of one thread
   public:
    Share(Tasks& all, int64_t own) : parts_(all.parts_), at_(own) {}
    int64_t take() {  // the next task, or -1
      const int64_t count = static_cast<int64_t>(parts_.size());
#ifdef FASTCL_STD_THREADS  // the first to start would do all of the tests' small loops
      const int64_t helped = 1;
#else
      const int64_t helped = count;
#endif
      for (; passed_ < helped; ++passed_, at_ = (at_ + 1) % count) {
        Part& part = parts_[at_];
        if (part.next.load(std::memory_order_relaxed) >= part.end) continue;  // many threads may look at once
        const int64_t task = part.next.fetch_add(1, std::memory_order_relaxed);
        if (task < part.end) return task;
      }
      return -1;
    }

   private:
    std::vector<Part>& parts_;
    int64_t at_, passed_ = 0;
  };
};

// f(share) on as many threads as there are `grain` tasks for; every task is taken once.
template <class F>
void par_tasks(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
#ifdef FASTCL_SMALL_GRAIN
  grain = 1;
#endif
  const int64_t parts = std::min((n + grain - 1) / grain, most_threads());
  Tasks tasks(n, parts);
  par_for(0, parts, 1, [&](int64_t own, int64_t) {
    Tasks::Share share(tasks, own);
    f(share);
  });
}

// f(first, last) for pieces of `grain`, as tasks.
template <class F>
void par_pieces(int64_t n, int64_t grain, const F& f) {
#ifdef FASTCL_SMALL_GRAIN
  grain = 1;
#endif
  par_tasks((n + grain - 1) / grain, 1, [&](Tasks::Share& share) {
    for (int64_t piece = share.take(); piece >= 0; piece = share.take())
      f(piece * grain, std::min(n, (piece + 1) * grain));
  });
}

}  // namespace fastcl

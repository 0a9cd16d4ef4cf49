// par_for on std::thread, for ThreadSanitizer: it cannot see the fork and join of torch's libgomp, and calls correct
// loops races. Only `.ci/sanitize` defines FASTCL_STD_THREADS. At exit the loops that ran are listed in the file
// $FASTCL_LOOPS, each with whether it ever ran on several threads: a loop that never split was not checked.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fastcl {

class LoopsThatRan {
 public:
  std::atomic<bool>* add(std::string name) {
    const std::lock_guard<std::mutex> hold(lock_);
    return (loops_.emplace_back(std::move(name), new std::atomic<bool>(false)), loops_.back().second);
  }
  ~LoopsThatRan() {
    const char* path = std::getenv("FASTCL_LOOPS");
    if (path == nullptr) return;
    std::ofstream to(path, std::ios::app);
    for (const auto& [name, split] : loops_) to << (split->load() ? "split " : "whole ") << name << '\n';
  }
  static LoopsThatRan& all() {
    static LoopsThatRan loops;
    return loops;
  }

 private:
  std::mutex lock_;
  std::vector<std::pair<std::string, std::atomic<bool>*>> loops_;
};

constexpr int64_t kStdThreads = 3;

// In so many parts, each thread starting where another ends. What f throws on another thread ends the program.
template <class F>
void std_threads_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  static std::atomic<bool>* const split = LoopsThatRan::all().add(__PRETTY_FUNCTION__);
  const int64_t n = end - begin, parts = n <= grain ? 1 : n < kStdThreads ? n : kStdThreads;
  if (parts > 1) split->store(true);
  std::vector<std::thread> others;
  for (int64_t k = 1; k < parts; ++k)
    others.emplace_back([&f, first = begin + n * k / parts, last = begin + n * (k + 1) / parts] { f(first, last); });
  f(begin, begin + n / parts);
  for (std::thread& other : others) other.join();
}

}  // namespace fastcl

// What every CPU kernel shares: instruction-set dispatch, threads, checks, dtypes, lists of tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "math.h"
#include "threads.h"

#if defined(_MSC_VER)
#define FASTCL_RESTRICT __restrict
#else
#define FASTCL_RESTRICT __restrict__
#endif

// The iterations of the loop that follows do not depend on each other, but within one every load stays before the
// stores that follow it, which FASTCL_RESTRICT would not promise.
#if defined(__clang__)
#define FASTCL_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define FASTCL_INDEPENDENT _Pragma("GCC ivdep")
#elif defined(_MSC_VER)
#define FASTCL_INDEPENDENT __pragma(loop(ivdep))
#else
#define FASTCL_INDEPENDENT
#endif

// Four iterations at a time: where another thread takes half of the core's decoding, the loop's own steps count.
#if defined(__GNUC__)
#define FASTCL_UNROLLED _Pragma("GCC unroll 4")
#else
#define FASTCL_UNROLLED
#endif

// The loop that follows stays a loop: gcc unrolls one of few iterations wholly, and then stores everything twice.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTCL_ROLLED _Pragma("GCC unroll 1")
#else
#define FASTCL_ROLLED
#endif

namespace fastcl {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// ---- checks: one sentence, thrown before anything is written; Python turns it into TypeError / ValueError ----

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

#define FASTCL_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) {              \
      ::fastcl::fail(__VA_ARGS__);   \
    }                                \
  } while (false)

// ---- instruction sets: one body, compiled three times, chosen at run time ----
// A body is a struct with a static FASTCL_HD function `run`; simd<Body>(args...) calls the copy for this CPU.

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2 };
Isa isa();  // this CPU's, or lower when FASTCL_CPU=baseline|avx2 asks for it
const char* isa_name();

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTCL_X86 1
#if defined(__clang__)
#define FASTCL_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
// GCC picks 256-bit vectors for x86-64-v4 by default; 512 is what the memory-bound loops were measured with.
#define FASTCL_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif
#define FASTCL_AVX2 __attribute__((target("arch=x86-64-v3")))

template <class Body, class... Args>
FASTCL_AVX512 auto run_avx512(Args... args) {
  return Body::run(args...);
}
template <class Body, class... Args>
FASTCL_AVX2 auto run_avx2(Args... args) {
  return Body::run(args...);
}
#endif

template <class Body, class... Args>
auto simd(Args... args) {
#ifdef FASTCL_X86
  if (isa() == Isa::avx512) return run_avx512<Body>(args...);
  if (isa() == Isa::avx2) return run_avx2<Body>(args...);
#endif
  return Body::run(args...);
}

inline int vector_bytes() { return isa() == Isa::avx512 ? 64 : isa() == Isa::avx2 ? 32 : 16; }

// The same for a body that is told vector_bytes().
template <template <int> class Body, class... Args>
auto simd_of_width(Args... args) {
#ifdef FASTCL_X86
  if (isa() == Isa::avx512) return run_avx512<Body<64>>(args...);
  if (isa() == Isa::avx2) return run_avx2<Body<32>>(args...);
#endif
  return Body<16>::run(args...);
}

// Scratch memory that begins with a line of the cache: a vector that lies in two lines costs two loads.
template <class T>
struct FreeAligned {
  void operator()(T* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};
template <class T>
using Aligned = std::unique_ptr<T[], FreeAligned<T>>;
template <class T>
Aligned<T> aligned(int64_t n) {
  return Aligned<T>(static_cast<T*>(::operator new(static_cast<size_t>(n) * sizeof(T), std::align_val_t(64))));
}

// Hints. Inlined whatever else: gcc leaves out the call of a function that does nothing but hint.
FASTCL_HD void prefetch(const void* at) {  // the line that will be written there
#ifdef __GNUC__
  __builtin_prefetch(at, 1);
#else
  (void)at;
#endif
}

FASTCL_HD void prefetch_read(const void* at) {
#ifdef __GNUC__
  __builtin_prefetch(at);
#else
  (void)at;
#endif
}

// The lines of `count` elements, two KiB further on: past a page's end a CPU does not look ahead by itself.
template <int64_t count, class T>
FASTCL_HD void read_ahead(const T* x) {
  const char* from = reinterpret_cast<const char*>(x) + 2048;
  for (size_t byte = 0; byte < count * sizeof(T); byte += 64) prefetch_read(from + byte);
}
template <int64_t count, class T>
FASTCL_HD void write_ahead(T* x) {
  const char* from = reinterpret_cast<const char*>(x) + 2048;
  for (size_t byte = 0; byte < count * sizeof(T); byte += 64) prefetch(from + byte);
}

// The line that will be read or written in a while: not into the first cache.
FASTCL_HD void prefetch_later(const void* at) {
#ifdef __GNUC__
  __builtin_prefetch(at, 0, 2);
#else
  (void)at;
#endif
}

// ---- sums ----

constexpr int kLanes = 16;  // partial sums; fixed, so that a sum does not depend on the vector width

// In double: a million equal terms in float lanes came out 1e-5 off, and the loop waits for memory anyway.
inline double sum_lanes(const double* lane) {
  double total = 0;
  for (int l = 0; l < kLanes; ++l) total += lane[l];
  return total;
}

// ---- dtypes: half precision is converted at load and rounded once at store; arithmetic is float or double ----

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

template <class T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class T>
using arithmetic_t = typename Arithmetic<T>::type;

FASTCL_HD float load(const float* x) { return *x; }
FASTCL_HD double load(const double* x) { return *x; }
FASTCL_HD float load(const BFloat16* x) { return float_from_bits(static_cast<int32_t>(uint32_t(x->x) << 16)); }
FASTCL_HD float load(const Half* x) { return static_cast<float>(*x); }
FASTCL_HD void store(float* x, float value) { *x = value; }
FASTCL_HD void store(double* x, double value) { *x = value; }
FASTCL_HD void store(Half* x, float value) { *x = Half(value); }
FASTCL_HD void store(BFloat16* x, float value) {  // round to nearest even; NaN to the quiet NaN, without a branch
  const uint32_t bits = static_cast<uint32_t>(float_bits(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  x->x = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

// An argument's name, put together only if a message needs it: strings for 400 tensors cost more than the work.
struct Name {
  Name(const char* text_) : text(text_) {}  // NOLINT: names are written as literals
  Name(const char* text_, size_t index_) : text(text_), index(static_cast<int64_t>(index_)) {}
  friend std::ostream& operator<<(std::ostream& to, const Name& name) {
    to << name.text;
    return name.index < 0 ? to : to << '[' << name.index << ']';
  }
  const char* text;
  int64_t index = -1;
};
inline Name item(const char* list, size_t i) { return {list, i}; }

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// Calls f(T{}) for the element type of `dtype`; the argument's name is for the message.
template <class F>
auto dispatch_float(ScalarType dtype, const char* op, Name name, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Half{});
    default:
      fail(op, ": ", name, " must be float32, float64, bfloat16 or float16");
  }
}

// ---- lists of tensors as one virtual array ----

size_t element_size(ScalarType dtype);
bool is_dense(const Tensor& t);                                 // non-overlapping, no gaps
bool same_layout(const Tensor& a, const Tensor& b);             // element k in memory is the same index in both
void check_output(const Tensor& t, const char* op, Name name);  // CPU, strided, no self-overlap
void check_like(const Tensor& t, const Tensor& like, const char* op, Name name, Name like_name);
void check_same_dtype(const Tensor& t, const Tensor& like, const char* op, Name name, Name like_name);
void check_lengths(size_t n, size_t expected, const char* op, const char* name, const char* like_name);
// No two mutated tensors, and no mutated and read tensor, may share memory (unless they are the very same view).
void check_distinct(const Tensors& outputs, const std::vector<const Tensors*>& inputs, const char* op,
                    const char* output_name, const std::vector<const char*>& input_names);
Tensor in_layout_of(const Tensor& t, const Tensor& like);  // t itself, or one copy whose memory order is like's
Tensor row_major(const Tensor& t);                         // t itself, or one copy
Tensor fresh_like(const Tensor& like);  // empty_like, and empty of at most 4 dimensions, at little cost (memory.cpp)
Tensor fresh(std::initializer_list<int64_t> sizes, ScalarType dtype);
Tensor without_gaps(const Tensor& t);  // t itself, or one copy in its memory order (empty_like's)

// Lists as addresses. A kernel takes its lists by reference (a copy of 200 handles is 400 atomic counts) and reads each
// handle once. What has gaps, or another memory order than its partner, is worked on in a copy.
class Addresses {
 public:
  // Mutated tensors; those with gaps are written back by finish().
  static Addresses outputs(const Tensors& tensors) {
    Addresses result(tensors);
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!is_dense(tensors[i])) {
        result.originals_.push_back(tensors[i]);
        result.replace(i, without_gaps(tensors[i]));
      }
    return result;
  }
  // Read tensors, in the memory order of `like`.
  static Addresses inputs(const Tensors& tensors, const Addresses& like) {
    Addresses result(tensors);
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!same_layout(tensors[i], like.tensor(i))) result.replace(i, in_layout_of(tensors[i], like.tensor(i)));
    return result;
  }

  Addresses(const int64_t* addresses, const int64_t* dtypes, size_t n) : tensors_(nullptr) {  // without handles
    data_.reserve(n);
    dtypes_.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      data_.push_back(reinterpret_cast<void*>(addresses[i]));
      dtypes_.push_back(static_cast<ScalarType>(dtypes[i]));
    }
  }

  template <class T>
  T* at(size_t i, int64_t begin) const {
    return static_cast<T*>(data_[i]) + begin;
  }
  ScalarType dtype(size_t i) const { return dtypes_[i]; }
  const Tensor& tensor(size_t i) const {
    for (const auto& [at, copy] : copies_)
      if (at == i) return copy;
    return (*tensors_)[i];
  }
  void finish() {
    for (size_t k = 0; k < originals_.size(); ++k) torch::stable::copy_(originals_[k], copies_[k].second);
  }

 private:
  explicit Addresses(const Tensors& tensors) : tensors_(&tensors) {
    data_.reserve(tensors.size());
    dtypes_.reserve(tensors.size());
    for (const Tensor& t : tensors) {
      data_.push_back(const_cast<void*>(t.const_data_ptr()));
      dtypes_.push_back(t.scalar_type());
    }
  }
  void replace(size_t i, Tensor copy) {
    data_[i] = const_cast<void*>(copy.const_data_ptr());
    copies_.emplace_back(i, std::move(copy));
  }

  const Tensors* tensors_;
  std::vector<void*> data_;
  std::vector<ScalarType> dtypes_;
  std::vector<std::pair<size_t, Tensor>> copies_;
  Tensors originals_;
};

// The elements of several tensors, end to end, each starting at a multiple of kAlign, cut into chunks of kChunk.
// Chunks do not depend on the number of threads, so neither do sums taken chunk by chunk.
class VirtualArray {
 public:
  static constexpr int64_t kAlign = 64;  // a packed mask's byte and every vector start on this
#ifdef FASTCL_SMALL_GRAIN
  static constexpr int64_t kChunk = 128;
#else
  static constexpr int64_t kChunk = 16384;  // 64 KiB of floats: L1/L2-sized; 8k to 32k measured alike
#endif
  void add(int64_t numel) {
    starts_.push_back(size_);
    numels_.push_back(numel);
    size_ += (numel + kAlign - 1) / kAlign * kAlign;
  }
  int64_t chunks() const { return (size_ + kChunk - 1) / kChunk; }

  // f(tensor index, begin, end, chunk) for every piece of every chunk, in order within a chunk.
  template <class F>
  void for_each(const F& f) const {
    const auto one = [&](int64_t chunk) {
      const int64_t low = chunk * kChunk, high = std::min(size_, low + kChunk);
      size_t t = std::upper_bound(starts_.begin(), starts_.end(), low) - starts_.begin() - 1;
      for (; t < starts_.size() && starts_[t] < high; ++t) {
        const int64_t begin = std::max<int64_t>(0, low - starts_[t]);
        const int64_t end = std::min(numels_[t], high - starts_[t]);
        if (begin < end) f(t, begin, end, chunk);
      }
    };
    const int64_t n_chunks = chunks();
    // Below 32k elements a second thread costs more than it brings (5-10 us to wake it).
    par_tasks(n_chunks, n_chunks <= 2 ? n_chunks : 1, [&](Tasks::Share& share) {
      for (int64_t chunk; (chunk = share.take()) >= 0;) one(chunk);
    });
  }

 private:
  std::vector<int64_t> starts_, numels_;
  int64_t size_ = 0;
};

// f(begin, n) over the pieces of one array.
template <class F>
void for_elements(int64_t numel, const F& f) {
  VirtualArray all;
  all.add(numel);
  all.for_each([&](size_t, int64_t begin, int64_t end, int64_t) { f(begin, end - begin); });
}

}  // namespace fastcl

#include "steps.h"

#include <cmath>

#include "../common/masks.h"
#include "math.h"

namespace fastcl {
namespace {

// What protects a piece of a parameter, settled once for the piece. A bool mask is read in the loop itself: it need not
// touch the gradient, since what it protects is not stored. The other forms are expanded to shares, block by block.
enum class Protection { nothing, bools, shares };

constexpr int64_t kBuffer = 512;  // 256 and 1024 were slower

template <class T, Protection protection>
struct Keep {
  const uint8_t* bools;
  const arithmetic_t<T>* free;

  FASTCL_HD arithmetic_t<T> gradient(arithmetic_t<T> g, int64_t i) const {
    return protection == Protection::shares ? g * free[i] : g;
  }
  FASTCL_HD T operator()(T x, int64_t i, arithmetic_t<T> value) const {  // the value, or x where it is protected
    if constexpr (protection == Protection::nothing) store(&x, value);
    if constexpr (protection == Protection::bools) store_unless(&x, bools[i], value);
    if constexpr (protection == Protection::shares) store_free(&x, free[i], value);
    return x;
  }
};

// body(keep, first, n) for every block of a piece.
template <class T, Protection protection, class Body>
FASTCL_HD void in_blocks(const MaskView& mask, int64_t begin, int64_t n, const Body& body) {
  if constexpr (protection != Protection::shares) {
    body(Keep<T, protection>{static_cast<const uint8_t*>(mask.data) + begin, nullptr}, int64_t(0), n);
  } else {
    alignas(64) arithmetic_t<T> free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      free_shares(free, mask, begin + at, m);
      body(Keep<T, protection>{nullptr, free}, at, m);
    }
  }
}

template <class T, bool kMomentum, Protection protection>
struct SgdStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* p, const T* g, T* b, MaskView mask, Sgd<A> sgd, int64_t begin, int64_t n) {
    in_blocks<T, protection>(mask, begin, n, [&](const auto& keep, int64_t at, int64_t m) FASTCL_LAMBDA_HD {
      block(p + at, g + at, b + at, keep, sgd, m);
    });
  }
  static FASTCL_HD void block(T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT g, T* FASTCL_RESTRICT b,
                              const Keep<T, protection> keep, const Sgd<A> sgd, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const A weight = load(p + i);
      A step = sgd.gradient(weight, keep.gradient(load(g + i), i));
      if constexpr (kMomentum) {
        const A buffer = sgd.buffer(load(b + i), step);
        b[i] = keep(b[i], i, buffer);
        step = sgd.direction(buffer, step);
      }
      p[i] = keep(p[i], i, sgd.update(weight, step));
    }
  }
};

template <class T, bool kLargest, Protection protection>
struct AdamStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* p, const T* g, T* m1, T* m2, T* largest, MaskView mask, Adam<A> adam, int64_t begin,
                            int64_t n) {
    in_blocks<T, protection>(mask, begin, n, [&](const auto& keep, int64_t at, int64_t m) FASTCL_LAMBDA_HD {
      block(p + at, g + at, m1 + at, m2 + at, largest + at, keep, adam, m);
    });
  }
  static FASTCL_HD void block(T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT g, T* FASTCL_RESTRICT m1,
                              T* FASTCL_RESTRICT m2, T* FASTCL_RESTRICT largest, const Keep<T, protection> keep,
                              const Adam<A> adam, int64_t n) {
    if constexpr (protection == Protection::nothing) {
      for (int64_t i = 0; i < n; ++i) one(p, m1, m2, largest, p, m1, m2, largest, g, keep, adam, i, i);
    } else {
      // All loads of a piece come before its stores: big arrays begin at the same place in their pages, and the CPU
      // takes the load of an old value for one of what was just stored to another array (4 KiB aliasing: 1.8 times the
      // time).
      alignas(64) T fresh[4][kBuffer];
      for (int64_t at = 0; at < n; at += kBuffer) {
        const int64_t m = std::min(kBuffer, n - at);
        for (int64_t j = 0; j < m; ++j)
          one(fresh[0], fresh[1], fresh[2], fresh[3], p, m1, m2, largest, g, keep, adam, j, at + j);
        for (int64_t j = 0; j < m; ++j) p[at + j] = fresh[0][j];
        for (int64_t j = 0; j < m; ++j) m1[at + j] = fresh[1][j];
        for (int64_t j = 0; j < m; ++j) m2[at + j] = fresh[2][j];
        for (int64_t j = 0; kLargest && j < m; ++j) largest[at + j] = fresh[3][j];
      }
    }
  }
  // Entry i of the old arrays to entry j of the new ones.
  static FASTCL_HD void one(T* new_p, T* new_m1, T* new_m2, T* new_largest, const T* p, const T* m1, const T* m2,
                            const T* largest, const T* g, const Keep<T, protection>& keep, const Adam<A>& adam,
                            int64_t j, int64_t i) {
    const A weight = load(p + i), gradient = adam.gradient(weight, keep.gradient(load(g + i), i));
    const A mean = adam.mean(load(m1 + i), gradient), square = adam.square(load(m2 + i), gradient);
    A scale = square;
    if constexpr (kLargest) {
      scale = adam.largest(load(largest + i), square);
      new_largest[j] = keep(largest[i], i, scale);
    }
    new_m1[j] = keep(m1[i], i, mean);
    new_m2[j] = keep(m2[i], i, square);
    new_p[j] = keep(p[i], i, adam.update(weight, mean, scale));
  }
};

template <class F>
void dispatch_protection(const MaskView& mask, const F& f) {
  if (mask.kind == MaskKind::none) return f(std::integral_constant<Protection, Protection::nothing>{});
  if (mask.kind == MaskKind::boolean) return f(std::integral_constant<Protection, Protection::bools>{});
  f(std::integral_constant<Protection, Protection::shares>{});
}

MaskView mask_of(const StepEntry& e) { return {static_cast<MaskKind>(e.kind), e.mask, e.inner, e.row}; }

template <class F>
void dispatch_entry(const StepEntry& e, const F& f) {
  switch (e.dtype) {
    case 0:
      return f(float{});
    case 1:
      return f(double{});
    case 2:
      return f(BFloat16{});
    default:
      return f(Half{});
  }
}

VirtualArray elements_of(const StepEntry* entries, int64_t n) {
  VirtualArray all;
  for (int64_t i = 0; i < n; ++i) all.add(entries[i].numel);
  return all;
}

void sgd_piece(const StepEntry& e, const SgdOptions& o, int64_t begin, int64_t n) {
  dispatch_entry(e, [&](auto type) {
    using T = decltype(type);
    using A = arithmetic_t<T>;
    const Sgd<A> sgd{A(o.lr),         A(o.momentum), A(1 - o.dampening), A(o.weight_decay), A(o.maximize ? -1 : 1),
                     o.nesterov != 0, e.first != 0};
    T* p = static_cast<T*>(e.param) + begin;
    const T* g = static_cast<const T*>(e.grad) + begin;
    dispatch_protection(mask_of(e), [&](auto constant) {
      constexpr Protection protection = decltype(constant)::value;
      if (e.state[0] != nullptr) {
        simd<SgdStep<T, true, protection>>(p, g, static_cast<T*>(e.state[0]) + begin, mask_of(e), sgd, begin, n);
      } else {
        simd<SgdStep<T, false, protection>>(p, g, static_cast<T*>(nullptr), mask_of(e), sgd, begin, n);
      }
    });
  });
}

struct Corrections {
  double step_size, root_scale;
};

// Counts every parameter's step; parameters mostly share the count, so the powers are taken once.
std::vector<Corrections> corrections_of(const StepEntry* entries, int64_t n, const AdamOptions& o) {
  std::vector<Corrections> all(n);
  double known = -1;
  for (int64_t i = 0; i < n; ++i) {
    const double step =
        entries[i].wide_step ? *static_cast<double*>(entries[i].step) += 1 : *static_cast<float*>(entries[i].step) += 1;
    if (i > 0 && step == known) {
      all[i] = all[i - 1];
      continue;
    }
    known = step;
    all[i] = {o.lr / (1 - std::pow(o.beta1, step)), 1 / std::sqrt(1 - std::pow(o.beta2, step))};
  }
  return all;
}

void adam_piece(const StepEntry& e, const AdamOptions& o, const Corrections& c, int64_t begin, int64_t n) {
  dispatch_entry(e, [&](auto type) {
    using T = decltype(type);
    using A = arithmetic_t<T>;
    const Adam<A> adam{A(1 - o.beta1),
                       A(o.beta2),
                       A(1 - o.beta2),
                       A(o.eps),
                       A(o.decoupled ? 0 : o.weight_decay),
                       A(o.decoupled ? 1 - o.lr * o.weight_decay : 1),
                       A(o.maximize ? -1 : 1),
                       A(c.step_size),
                       A(c.root_scale)};
    T* p = static_cast<T*>(e.param) + begin;
    const T* g = static_cast<const T*>(e.grad) + begin;
    T* m1 = static_cast<T*>(e.state[0]) + begin;
    T* m2 = static_cast<T*>(e.state[1]) + begin;
    dispatch_protection(mask_of(e), [&](auto constant) {
      constexpr Protection protection = decltype(constant)::value;
      if (e.state[2] != nullptr) {
        T* largest = static_cast<T*>(e.state[2]) + begin;
        simd<AdamStep<T, true, protection>>(p, g, m1, m2, largest, mask_of(e), adam, begin, n);
      } else {
        simd<AdamStep<T, false, protection>>(p, g, m1, m2, static_cast<T*>(nullptr), mask_of(e), adam, begin, n);
      }
    });
  });
}

}  // namespace
}  // namespace fastcl

void masked_sgd_entries(const fastcl::StepEntry* entries, int64_t n, const fastcl::SgdOptions* options) {
  using namespace fastcl;
  elements_of(entries, n).for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    sgd_piece(entries[t], *options, begin, end - begin);
  });
}

void masked_adam_entries(const fastcl::StepEntry* entries, int64_t n, const fastcl::AdamOptions* options) {
  using namespace fastcl;
  const auto corrections = corrections_of(entries, n, *options);
  elements_of(entries, n).for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    adam_piece(entries[t], *options, corrections[t], begin, end - begin);
  });
}

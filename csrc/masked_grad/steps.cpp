#include "steps.h"

#include <cmath>

#include "../common/masks.h"
#include "math.h"

namespace fastcl {
namespace {

template <class T, bool kMomentum>
struct SgdStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT g, T* FASTCL_RESTRICT b, MaskView mask,
                            Sgd<A> sgd, int64_t begin, int64_t n) {
    alignas(64) A free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      if (at == 0 || mask.kind != MaskKind::none) free_shares(free, mask, begin + at, m);
      for (int64_t i = 0; i < m; ++i) {
        const A weight = load(p + at + i);
        A step = sgd.gradient(weight, load(g + at + i) * free[i]);
        if constexpr (kMomentum) {
          const A buffer = sgd.buffer(load(b + at + i), step);
          store_free(b + at + i, free[i], buffer);
          step = sgd.direction(buffer, step);
        }
        store_free(p + at + i, free[i], sgd.update(weight, step));
      }
    }
  }
};

template <class T, bool kLargest>
struct AdamStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT g, T* FASTCL_RESTRICT m1,
                            T* FASTCL_RESTRICT m2, T* FASTCL_RESTRICT largest, MaskView mask, Adam<A> adam,
                            int64_t begin, int64_t n) {
    alignas(64) A free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      if (at == 0 || mask.kind != MaskKind::none) free_shares(free, mask, begin + at, m);
      for (int64_t i = 0; i < m; ++i) {
        const A weight = load(p + at + i), share = free[i];
        const A gradient = adam.gradient(weight, load(g + at + i) * share);
        const A mean = adam.mean(load(m1 + at + i), gradient);
        const A square = adam.square(load(m2 + at + i), gradient);
        A scale = square;
        if constexpr (kLargest) {
          scale = adam.largest(load(largest + at + i), square);
          store_free(largest + at + i, share, scale);
        }
        store_free(m1 + at + i, share, mean);
        store_free(m2 + at + i, share, square);
        store_free(p + at + i, share, adam.update(weight, mean, scale));
      }
    }
  }
};

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
    if (e.state[0] != nullptr) {
      simd<SgdStep<T, true>>(p, g, static_cast<T*>(e.state[0]) + begin, mask_of(e), sgd, begin, n);
    } else {
      simd<SgdStep<T, false>>(p, g, p, mask_of(e), sgd, begin, n);
    }
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
    if (e.state[2] != nullptr) {
      simd<AdamStep<T, true>>(p, g, m1, m2, static_cast<T*>(e.state[2]) + begin, mask_of(e), adam, begin, n);
    } else {
      simd<AdamStep<T, false>>(p, g, m1, m2, m2, mask_of(e), adam, begin, n);
    }
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

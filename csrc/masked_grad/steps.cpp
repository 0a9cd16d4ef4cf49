#include "steps.h"

#include <cmath>

#include "../common/masks.h"
#include "math.h"

namespace fastcl {
namespace {

// What protects a piece of a parameter, settled once for the piece and expanded block by block: bools and bits to words
// that are negative where one is set (they need not touch the gradient, since what they protect is not stored), every
// other form to shares. A word as wide as a float keeps the loop free of unpacking, which would spill.
enum class Protection { nothing, words, shares };

template <class T, Protection protection>
struct Keep {
  const int32_t* words;
  const arithmetic_t<T>* free;

  FASTCL_HD arithmetic_t<T> gradient(arithmetic_t<T> g, int64_t i) const {
    return protection == Protection::shares ? g * free[i] : g;
  }
  FASTCL_HD T operator()(T x, int64_t i, arithmetic_t<T> value) const {  // the value, or x where it is protected
    if constexpr (protection == Protection::nothing) store(&x, value);
    if constexpr (protection == Protection::words) x = choose(words[i] < 0, x, value);
    if constexpr (protection == Protection::shares) x = choose(free[i] == 0, x, value);
    return x;
  }
};

// body(keep, first, n) for every block of a piece that is not wholly reserved. Blocks of a fixed few, so that a mask is
// unpacked while the square roots and divisions of the block before it are under way, and memory is asked for in time
// (11M weights: Adam 7.7 -> 5.8 ms, SGD 5.0 -> 3.7).
constexpr int64_t kStepBlock = kAlike;

template <class T, Protection protection, class Body>
FASTCL_HD void in_blocks(const MaskView& mask, int64_t begin, int64_t n, const Body& body) {
  if constexpr (protection == Protection::nothing) {
    const Keep<T, protection> none{nullptr, nullptr};
    int64_t at = 0;
    for (; at + kStepBlock <= n; at += kStepBlock) body(none, at, kStepBlock);
    if (at < n) body(none, at, n - at);
  } else {
    using Word = std::conditional_t<protection == Protection::words, int32_t, arithmetic_t<T>>;
    alignas(64) Word unpacked[kStepBlock];
    const auto block = [&](int64_t at, int64_t m) FASTCL_LAMBDA_HD {
      if constexpr (protection == Protection::words) {
        if (m == kAlike && alike(mask, begin + at) == Alike::reserved) return;
        keep_words(unpacked, mask, begin + at, m);
        body(Keep<T, protection>{unpacked, nullptr}, at, m);
      } else {
        free_shares(unpacked, mask, begin + at, m);
        if (m == kAlike && alike(unpacked) == Alike::reserved) return;
        body(Keep<T, protection>{nullptr, unpacked}, at, m);
      }
    };
    int64_t at = 0;
    for (; at + kStepBlock <= n; at += kStepBlock) block(at, kStepBlock);
    if (at < n) block(at, n - at);
  }
}

// In both steps every old value is read before the first store: big arrays begin at the same place in their pages, and
// a CPU takes the load of one for a load of what was just stored to another (4 KiB aliasing: up to 1.8 times the time).
// What is the same for a whole piece is settled outside its loop for float: asked within, gcc's code for the usual case
// is slower. The other types ask: each answer is compiled for every mask and instruction set.
enum class Settled { no, yes, ask };

template <Settled decays, class Step, class A>
FASTCL_HD A decayed(const Step& step, A weight, A gradient) {
  if constexpr (decays == Settled::no) return gradient;
  return decays == Settled::yes || step.decay != A(0) ? gradient + step.decay * weight : gradient;
}

template <class T, bool kMomentum, Protection protection>
struct SgdStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* p, const T* g, T* b, MaskView mask, Sgd<A> sgd, int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<T, float>)
      if (!sgd.nesterov && !sgd.first)
        return sgd.decay != A(0) ? piece<Settled::yes, true>(p, g, b, mask, sgd, begin, n)
                                 : piece<Settled::no, true>(p, g, b, mask, sgd, begin, n);
    piece<Settled::ask, false>(p, g, b, mask, sgd, begin, n);
  }
  template <Settled decays, bool kRunning>  // kRunning: neither the first step nor Nesterov's
  static FASTCL_HD void piece(T* p, const T* g, T* b, const MaskView& mask, const Sgd<A>& sgd, int64_t begin,
                              int64_t n) {
    in_blocks<T, protection>(mask, begin, n, [&](const auto& keep, int64_t at, int64_t m) FASTCL_LAMBDA_HD {
      block<decays, kRunning>(p + at, g + at, b + at, keep, sgd, m);
    });
  }
  template <Settled decays, bool kRunning>
  static FASTCL_HD void block(T* p, const T* g, T* b, const Keep<T, protection> keep, const Sgd<A> sgd, int64_t n) {
    read_ahead<kStepBlock>(g);
    write_ahead<kStepBlock>(p);
    if constexpr (kMomentum) write_ahead<kStepBlock>(b);
    FASTCL_INDEPENDENT
    FASTCL_ROLLED
    for (int64_t i = 0; i < n; ++i) {
      const T old_p = p[i];
      const A weight = load(&old_p), gradient = decayed<decays>(sgd, weight, keep.gradient(load(g + i), i));
      if constexpr (kMomentum) {
        const T old_b = b[i];
        const A before = load(&old_b);
        const A buffer = kRunning ? sgd.buffered(before, gradient) : sgd.started(before, gradient);
        const A direction = kRunning ? buffer : sgd.direction(buffer, gradient);
        const T new_p = keep(old_p, i, sgd.update(weight, direction));
        b[i] = keep(old_b, i, buffer);
        p[i] = new_p;
      } else {
        p[i] = keep(old_p, i, sgd.update(weight, sgd.sign * gradient));
      }
    }
  }
};

template <class T, bool kLargest, Protection protection>
struct AdamStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* p, const T* g, T* m1, T* m2, T* largest, MaskView mask, Adam<A> adam, int64_t begin,
                            int64_t n) {
    if constexpr (std::is_same_v<T, float>)
      if (adam.decay == A(0)) return piece<Settled::no>(p, g, m1, m2, largest, mask, adam, begin, n);
    piece<Settled::ask>(p, g, m1, m2, largest, mask, adam, begin, n);
  }
  template <Settled decays>
  static FASTCL_HD void piece(T* p, const T* g, T* m1, T* m2, T* largest, const MaskView& mask, const Adam<A>& adam,
                              int64_t begin, int64_t n) {
    in_blocks<T, protection>(mask, begin, n, [&](const auto& keep, int64_t at, int64_t m) FASTCL_LAMBDA_HD {
      block<decays>(p + at, g + at, m1 + at, m2 + at, largest + at, keep, adam, m);
    });
  }
  template <Settled decays>
  static FASTCL_HD void block(T* p, const T* g, T* m1, T* m2, T* largest, const Keep<T, protection> keep,
                              const Adam<A> adam, int64_t n) {
    read_ahead<kStepBlock>(g);
    for (T* updated : {p, m1, m2}) write_ahead<kStepBlock>(updated);
    if constexpr (kLargest) write_ahead<kStepBlock>(largest);
    FASTCL_INDEPENDENT
    FASTCL_ROLLED
    for (int64_t i = 0; i < n; ++i) {
      const T old_p = p[i], old_m1 = m1[i], old_m2 = m2[i], old_largest = kLargest ? largest[i] : T{};
      const A weight = load(&old_p), gradient = decayed<decays>(adam, weight, keep.gradient(load(g + i), i));
      const A mean = adam.mean(load(&old_m1), gradient), square = adam.square(load(&old_m2), gradient);
      const A scale = kLargest ? adam.largest(load(&old_largest), square) : square;
      const T new_p = keep(old_p, i, adam.update(weight, mean, scale));
      const T new_m1 = keep(old_m1, i, mean), new_m2 = keep(old_m2, i, square);
      const T new_largest = keep(old_largest, i, scale);
      p[i] = new_p;
      m1[i] = new_m1;
      m2[i] = new_m2;
      if constexpr (kLargest) largest[i] = new_largest;
    }
  }
};

template <class F>
void dispatch_protection(const MaskView& mask, const F& f) {
  if (mask.kind == MaskKind::none) return f(std::integral_constant<Protection, Protection::nothing>{});
  if (mask.kind == MaskKind::boolean || mask.kind == MaskKind::packed)
    return f(std::integral_constant<Protection, Protection::words>{});
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
    const double sign = o.maximize ? -1 : 1;
    const Sgd<A> sgd{A(o.lr), A(o.momentum),   A(1 - o.dampening), A(sign * o.weight_decay),
                     A(sign), o.nesterov != 0, e.first != 0};
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
    const double sign = o.maximize ? -1 : 1;
    const Adam<A> adam{A(1 - o.beta1),
                       A(o.beta2),
                       A(1 - o.beta2),
                       A(o.eps),
                       A(o.decoupled ? 0 : sign * o.weight_decay),
                       A(o.decoupled ? 1 - o.lr * o.weight_decay : 1),
                       A(sign),
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

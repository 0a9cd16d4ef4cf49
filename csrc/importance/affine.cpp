// accumulate_affine_: the per-sample gradients of a normalisation's weight and bias (or of any bias), to a power,
// summed.
#include <memory>

#include "../common/cpu.h"
#include "../common/lanes.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "accumulate_affine_";
constexpr int64_t kFeatures = 64;  // features a body holds in registers and L1 while it walks the positions
constexpr int64_t kChunks = 32;    // of samples, at most

// [samples, positions, features] by strides; shift and scale may have stride 0 along any of them.
struct Layout {
  int64_t g[3], x[3], shift[3], scale[3];
  int64_t positions;
};

// One sample: w[c] += |sum_p g (x - shift) scale|^power, b[c] += |sum_p g|^power.
template <class T, class In, bool normalised>
struct AddSample {
  static FASTCL_HD void run(T* w, T* b, const In* g, const In* x, const In* shift, const In* scale, const Layout* at,
                            int64_t features, int power) {
    T weight[kFeatures], bias[kFeatures];
    for (int64_t c = 0; c < features; c += kFeatures) {
      const int64_t count = features - c < kFeatures ? features - c : kFeatures;
      some(weight, bias, g + c * at->g[2], x + c * at->x[2], shift + c * at->shift[2], scale + c * at->scale[2], at,
           count);
      if (normalised) add_raised(w + c, weight, count, power);
      add_raised(b + c, bias, count, power);
    }
  }
  static FASTCL_HD void add_raised(T* FASTCL_RESTRICT to, const T* FASTCL_RESTRICT sums, int64_t count, int power) {
    if (power == 2)
      for (int64_t c = 0; c < count; ++c) to[c] += importance_of<2>(sums[c]);
    else
      for (int64_t c = 0; c < count; ++c) to[c] += importance_of<1>(sums[c]);
  }

  // `count` <= kFeatures features: weight[c] = sum_p g (x - shift) scale, bias[c] = sum_p g.
  static FASTCL_HD void some(T* weight, T* bias, const In* g, const In* x, const In* shift, const In* scale,
                             const Layout* at, int64_t count) {
    if (at->g[2] == 1 && (!normalised || at->x[2] == 1)) {
      for (int64_t c = 0; c < count; ++c) weight[c] = bias[c] = T(0);
      if (!normalised) return add_bias(bias, g, at, count);
      if (at->shift[1] == 0 && at->scale[1] == 0 && at->shift[2] == 1 && at->scale[2] == 1)
        return per_feature(weight, bias, g, x, shift, scale, at, count);
      if (at->shift[2] == 0 && at->scale[2] == 0) return per_position(weight, bias, g, x, shift, scale, at, count);
    }
    const bool side_by_side =
        at->g[1] == 1 && (!normalised || (at->x[1] == 1 && at->shift[1] == 0 && at->scale[1] == 0));
    for (int64_t c = 0; c < count; ++c) {
      const In *gc = g + c * at->g[2], *xc = x + c * at->x[2];
      const In *shift_c = shift + c * at->shift[2], *scale_c = scale + c * at->scale[2];
      if (side_by_side)
        along_positions(weight + c, bias + c, gc, xc, static_cast<T>(load(shift_c)), static_cast<T>(load(scale_c)),
                        at->positions);
      else
        by_strides(weight + c, bias + c, gc, xc, shift_c, scale_c, at);
    }
  }

  static constexpr int kHalf = kLanes / 2;  // as wide as gcc stores what load_some converts: wider loads would wait
  using Vector = typename Lanes<T, kHalf>::Vector;
  template <int n>
  static FASTCL_HD T sum(const typename Lanes<T, n>::Vector& lanes) {  // by halves, of which none waits for another
    const T* lane = reinterpret_cast<const T*>(&lanes);
    if constexpr (n == 2) {
      return lane[0] + lane[1];
    } else {
      using Half = typename Lanes<T, n / 2>::Vector;
      Half half = *reinterpret_cast<const Half*>(lane);
      half += *reinterpret_cast<const Half*>(lane + n / 2);
      return sum<n / 2>(half);
    }
  }
  // In vectors written out: of two sums in one loop gcc makes scalar code.
  struct Sums {
    Vector w[2] = {}, b[2] = {};
    FASTCL_HD void add(const T* g, const T* x, T shift, int64_t n) {  // n is a multiple of kLanes
      for (int64_t i = 0; i < n; i += kLanes)
        for (int h = 0; h < 2; ++h) {
          const Vector gi = *reinterpret_cast<const Vector*>(g + i + h * kHalf);
          b[h] += gi;
          if (normalised) w[h] += gi * (*reinterpret_cast<const Vector*>(x + i + h * kHalf) - shift);
        }
    }
    static FASTCL_HD T of(Vector* halves) {
      halves[0] += halves[1];
      return sum<kHalf>(halves[0]);
    }
  };
  static FASTCL_HD void along_positions(T* weight, T* bias, const In* g, const In* x, T shift, T scale, int64_t n) {
    constexpr int64_t kAtOnce = std::is_same_v<T, In> ? kLanes : 256;
    Sums sums;
    int64_t p = 0;
    if constexpr (std::is_same_v<T, In>) {
      p = n / kLanes * kLanes;
      sums.add(g, x, shift, p);
    }
    alignas(64) T gs[kAtOnce], xs[kAtOnce];
    for (; p < n; p += kAtOnce) {
      const int64_t count = n - p < kAtOnce ? n - p : kAtOnce;
      load_some(gs, g + p, count);
      if (normalised) load_some(xs, x + p, count);
      sums.add(gs, xs, shift, (count + kLanes - 1) / kLanes * kLanes);
    }
    *weight = Sums::of(sums.w) * scale;
    *bias = Sums::of(sums.b);
  }
  static FASTCL_HD void load_some(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(load(from + i));
    for (int64_t i = n; i % kLanes != 0; ++i) to[i] = T(0);
  }
  static FASTCL_HD void by_strides(T* weight, T* bias, const In* g, const In* x, const In* shift, const In* scale,
                                   const Layout* at) {
    T w_lane[kLanes] = {}, b_lane[kLanes] = {};
    for (int64_t p = 0; p < at->positions; ++p) {
      const T gi = static_cast<T>(load(g + p * at->g[1]));
      b_lane[p % kLanes] += gi;
      if (normalised)
        w_lane[p % kLanes] +=
            gi * ((static_cast<T>(load(x + p * at->x[1])) - static_cast<T>(load(shift + p * at->shift[1]))) *
                  static_cast<T>(load(scale + p * at->scale[1])));
    }
    *weight = Sums::of(reinterpret_cast<Vector*>(w_lane));
    *bias = Sums::of(reinterpret_cast<Vector*>(b_lane));
  }

  static FASTCL_HD void add_bias(T* FASTCL_RESTRICT bias, const In* FASTCL_RESTRICT g, const Layout* at,
                                 int64_t count) {
    for (int64_t p = 0; p < at->positions; ++p)
      for (int64_t c = 0; c < count; ++c) bias[c] += static_cast<T>(load(g + p * at->g[1] + c));
  }
  static FASTCL_HD void per_feature(T* FASTCL_RESTRICT weight, T* FASTCL_RESTRICT bias, const In* FASTCL_RESTRICT g,
                                    const In* FASTCL_RESTRICT x, const In* FASTCL_RESTRICT shift,
                                    const In* FASTCL_RESTRICT scale, const Layout* at, int64_t count) {
    for (int64_t p = 0; p < at->positions; ++p) {
      const In *gp = g + p * at->g[1], *xp = x + p * at->x[1];
      for (int64_t c = 0; c < count; ++c) {
        const T gi = static_cast<T>(load(gp + c));
        bias[c] += gi;
        weight[c] += gi * (static_cast<T>(load(xp + c)) - static_cast<T>(load(shift + c)));
      }
    }
    for (int64_t c = 0; c < count; ++c) weight[c] *= static_cast<T>(load(scale + c));
  }
  static FASTCL_HD void per_position(T* FASTCL_RESTRICT weight, T* FASTCL_RESTRICT bias, const In* FASTCL_RESTRICT g,
                                     const In* FASTCL_RESTRICT x, const In* FASTCL_RESTRICT shift,
                                     const In* FASTCL_RESTRICT scale, const Layout* at, int64_t count) {
    for (int64_t p = 0; p < at->positions; ++p) {
      const In *gp = g + p * at->g[1], *xp = x + p * at->x[1];
      const T m = static_cast<T>(load(shift + p * at->shift[1])), r = static_cast<T>(load(scale + p * at->scale[1]));
      for (int64_t c = 0; c < count; ++c) {
        const T gi = static_cast<T>(load(gp + c));
        bias[c] += gi;
        weight[c] += gi * ((static_cast<T>(load(xp + c)) - m) * r);
      }
    }
  }
};

template <class T, class In, bool normalised>
void accumulate(T* weight_out, T* bias_out, const Tensor& grad, const Tensors& norm, const Layout& at, int power) {
  const In* g = static_cast<const In*>(grad.const_data_ptr());
  const In* x = normalised ? static_cast<const In*>(norm[0].const_data_ptr()) : g;
  const In* shift = normalised ? static_cast<const In*>(norm[1].const_data_ptr()) : g;
  const In* scale = normalised ? static_cast<const In*>(norm[2].const_data_ptr()) : g;
  const int64_t samples = grad.size(0), features = grad.size(2);
  // Every thread walks samples of its own, and all of their features, which lie side by side in one layout or the
  // other. The chunks of samples depend on N alone, and are added up in order: so the thread count does not matter.
  const int64_t each = (samples + kChunks - 1) / kChunks, chunks = (samples + each - 1) / each;
  std::unique_ptr<T[]> sums(new T[2 * chunks * features]());
  par_pieces(chunks, std::max<int64_t>(1, 32768 / (each * features * at.positions)), [&](int64_t first, int64_t last) {
    for (int64_t n = first * each; n < std::min(samples, last * each); ++n) {
      T* w = sums.get() + 2 * (n / each) * features;
      simd<AddSample<T, In, normalised>>(w, w + features, g + n * at.g[0], x + n * at.x[0], shift + n * at.shift[0],
                                         scale + n * at.scale[0], &at, features, power);
    }
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const T *w = sums.get() + 2 * chunk * features, *b = w + features;
    for (int64_t c = 0; c < features; ++c) {
      if (weight_out) weight_out[c] += w[c];
      if (bias_out) bias_out[c] += b[c];
    }
  }
}

// weights and biases: lists of none or one [C]; grad [N, P, C]; normalised: none, or x, shift, scale like grad.
void accumulate_affine_(const Tensors& weights, const Tensors& biases, const Tensor& grad, const Tensors& normalised,
                        int64_t power) {
  FASTCL_CHECK(power == 1 || power == 2, kOp, ": power is ", power, " but must be 1 or 2");
  FASTCL_CHECK(weights.size() <= 1 && biases.size() <= 1, kOp,
               ": weights and biases must each have at most one tensor");
  FASTCL_CHECK(normalised.size() == 3 || (normalised.empty() && weights.empty()), kOp,
               ": normalised must be [x, shift, scale] (or empty, for a bias alone)");
  FASTCL_CHECK(grad.is_cpu() && grad.dim() == 3, kOp, ": grad must be a CPU tensor [N, P, C]");
  dispatch_float(grad.scalar_type(), kOp, "grad", [](auto) {});
  ScalarType sum_type = ScalarType::Float;
  for (const Tensors* list : {&weights, &biases})
    for (const Tensor& out : *list) {
      const char* name = list == &weights ? "weights[0]" : "biases[0]";
      check_output(out, kOp, name);
      sum_type = out.scalar_type();
      FASTCL_CHECK(sum_type == ScalarType::Float || sum_type == ScalarType::Double, kOp, ": ", name,
                   " must be float32 or float64, the types that sums are kept in");
      FASTCL_CHECK(out.dim() == 1 && out.size(0) == grad.size(2) && out.is_contiguous(), kOp, ": ", name,
                   " must be contiguous [C] with the features of grad, ", grad.size(2));
    }
  if (!weights.empty() && !biases.empty()) check_same_dtype(biases[0], weights[0], kOp, "biases[0]", "weights[0]");
  for (size_t i = 0; i < normalised.size(); ++i) {
    check_like(normalised[i], grad, kOp, item("normalised", i), "grad");
    check_same_dtype(normalised[i], grad, kOp, item("normalised", i), "grad");
  }
  Tensors outputs = weights;
  outputs.insert(outputs.end(), biases.begin(), biases.end());
  Tensors inputs = normalised;
  inputs.push_back(grad);
  check_distinct(outputs, {&inputs}, kOp, "outputs", {"inputs"});
  if (grad.numel() == 0) return;

  Layout at = {};
  at.positions = grad.size(1);
  for (int d = 0; d < 3; ++d) {
    if (grad.size(d) == 1) continue;  // its stride may be anything, and would hide how the others lie
    at.g[d] = grad.stride(d);
    if (normalised.empty()) continue;
    at.x[d] = normalised[0].stride(d);
    at.shift[d] = normalised[1].stride(d);
    at.scale[d] = normalised[2].stride(d);
  }
  dispatch_float(grad.scalar_type(), kOp, "grad", [&](auto type) {
    using In = decltype(type);
    const auto run = [&](auto sum) {
      using T = decltype(sum);
      T* w = weights.empty() ? nullptr : static_cast<T*>(weights[0].mutable_data_ptr());
      T* b = biases.empty() ? nullptr : static_cast<T*>(biases[0].mutable_data_ptr());
      if (normalised.empty())
        accumulate<T, In, false>(w, b, grad, normalised, at, static_cast<int>(power));
      else
        accumulate<T, In, true>(w, b, grad, normalised, at, static_cast<int>(power));
    };
    if (sum_type == ScalarType::Double)
      run(double{});
    else
      run(float{});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("accumulate_affine_", TORCH_BOX(&accumulate_affine_)); }

}  // namespace fastcl

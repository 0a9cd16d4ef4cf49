// gmm_log_prob: log N(x | mu_k, L_k L_k^T) for every sample and component. y = L^-1 (x - mu) is a product of tiles with
// the inverse factor, which is taken once a component in double. gmm_responsibilities: the mixture's density and the
// components' shares of it, EM's E-step, while a block's log densities lie in the cache.
#include <cmath>

#include "../common/transpose.h"
#include "blocks.h"
#include "deviations.h"
#include "diagonal.h"
#include "math.h"

namespace fastcl {
namespace {

template <class T>
struct Shift {  // to[j][s] = x[j][s] - mu[j]
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const T* FASTCL_RESTRICT x, const T* FASTCL_RESTRICT mean,
                            int64_t features, int64_t width) {
    for (int64_t j = 0; j < features; ++j)
      for (int64_t s = 0; s < width; ++s) to[j * width + s] = x[j * width + s] - mean[j];
  }
};

// inverse of the lower triangular L (row-major, D x D), by columns.
void invert(std::vector<double>& inverse, const std::vector<double>& l, int64_t d) {
  std::fill(inverse.begin(), inverse.end(), 0.0);
  for (int64_t j = 0; j < d; ++j) inverse[j * d + j] = 1.0 / l[j * d + j];
  for (int64_t i = 0; i < d; ++i) {
    double* row = inverse.data() + i * d;
    for (int64_t k = 0; k < i; ++k) {  // row i -= L[i, k] * row k, all columns up to k at once
      const double factor = -l[i * d + k] / l[i * d + i];
      const double* other = inverse.data() + k * d;
      for (int64_t j = 0; j <= k; ++j) row[j] += factor * other[j];
    }
  }
}

// Log densities [components][width] of the samples of a block, whose width this knows, with whole factors.
template <class In>
struct Density {
  using T = arithmetic_t<In>;

  const int64_t components, features;
  const TileChoice<T> tile;
  const int64_t width;
  std::unique_ptr<T[]> mean, constant;
  Factors<T> factors;

  Density(const char* op, const Tensor& means, const Tensor& trils)
      : components(means.size(0)),
        features(means.size(1)),
        tile(choose_tile<T>()),
        width(tile.nr),
        mean(new T[components * features]),
        constant(new T[components]),
        factors(components, features, tile.mr) {
    const In* mu = static_cast<const In*>(means.const_data_ptr());
    const In* l = static_cast<const In*>(trils.const_data_ptr());
    std::vector<char> good(components, 1);
    const int64_t cost = features * features * features / 6 + 1;
    par_for(0, components, std::max<int64_t>(1, 32768 / cost), [&](int64_t first, int64_t last) {
      std::vector<double> factor(features * features), inverted(factor.size());
      std::vector<In> deviations(features);
      std::vector<T> inverses(features);
      for (int64_t k = first; k < last; ++k) {
        for (int64_t i = 0; i < features; ++i) mean[k * features + i] = load(mu + k * features + i);
        for (int64_t i = 0; i < features; ++i) deviations[i] = l[(k * features + i) * features + i];
        const Deviations found =
            simd<Invert<T, In>>(inverses.data(), static_cast<const In*>(deviations.data()), features);
        good[k] = found.good;
        constant[k] = static_cast<T>(log_constant(found.log, features));
        if (!good[k]) continue;
        for (int64_t i = 0; i < features * features; ++i) factor[i] = load(l + k * features * features + i);
        invert(inverted, factor, features);
        for (int64_t i = 0; i < features; ++i)
          for (int64_t j = 0; j <= i; ++j) factors.set(k, i, j, static_cast<T>(inverted[i * features + j]));
      }
    });
    check_deviations(op, good);
  }

  // body(logs, begin, samples) for every block of the rows of x; begin + samples is at most n.
  template <class F>
  void for_each(const In* x, int64_t n, const F& body) const {
    const int64_t work = width * components * features * (1 + features / 32);
#ifdef FASTCL_SMALL_GRAIN
    constexpr int64_t kWork = 1;  // the tests' few blocks go to several threads too
#else
    constexpr int64_t kWork = 131072;
#endif
    par_tasks(ceil_div(n, width), std::max<int64_t>(1, kWork / work), [&](Tasks::Share& share) {
      const Aligned<T> block = aligned<T>(features * width), shifted = aligned<T>(features * width);
      const Aligned<T> logs = aligned<T>(components * width);
      for (int64_t b = share.take(); b >= 0; b = share.take()) {
        const int64_t begin = b * width, samples = std::min(width, n - begin);
        if (samples < width) std::fill_n(block.get(), features * width, T(0));  // numbers where there are no samples
        transpose(block.get(), width, x + begin * features, features, samples, features);
        for (int64_t k = 0; k < components; ++k) {
          T* own = logs.get() + k * width;
          simd<Shift<T>>(shifted.get(), static_cast<const T*>(block.get()),
                         static_cast<const T*>(mean.get() + k * features), features, width);
          tile.triangle_squares(factors.panel(k, 0), features, shifted.get(), own);
          for (int64_t s = 0; s < width; ++s) own[s] = constant[k] - T(0.5) * own[s];
        }
        body(logs.get(), begin, samples);
      }
    });
  }
};

// Of logs [k][s], a few samples at a time: their rows of `out`, which lie together, are written while they are in the
// first cache.
template <class In, class T>
void to_rows(In* out, const T* logs, int64_t width, int64_t samples, int64_t components) {
  for (int64_t s = 0; s < samples; s += 16)
    transpose(out + s * components, components, logs + s, width, components, std::min<int64_t>(16, samples - s));
}

// logs [k][s] become responsibilities, `top` the log densities of the mixture. Shares below e^-60 (e^-600 in double) of
// the largest are 0: what follows would be slow on subnormal numbers, of which a good separation is full.
template <class T>
struct Shares {
  static FASTCL_HD void run(T* FASTCL_RESTRICT logs, T* FASTCL_RESTRICT top, T* FASTCL_RESTRICT total,
                            const T* FASTCL_RESTRICT log_weights, int64_t components, int64_t width) {
    const T least = sizeof(T) == 4 ? T(-60) : T(-600);
    for (int64_t s = 0; s < width; ++s) {
      top[s] = logs[s] + log_weights[0];
      total[s] = T(0);
    }
    for (int64_t k = 0; k < components; ++k)
      for (int64_t s = 0; s < width; ++s) {
        const T value = logs[k * width + s] + log_weights[k];
        logs[k * width + s] = value;
        top[s] = value > top[s] || value != value ? value : top[s];
      }
    for (int64_t k = 0; k < components; ++k)
      for (int64_t s = 0; s < width; ++s) {
        const T below = logs[k * width + s] - top[s], share = below < least ? T(0) : exp_not_positive(below);
        logs[k * width + s] = share;
        total[s] += share;
      }
    for (int64_t s = 0; s < width; ++s) {
      total[s] = T(1) / total[s];
      top[s] = total[s] == total[s] ? top[s] - log_unit(total[s]) : total[s];  // log_unit takes NaN for a number
    }
    for (int64_t k = 0; k < components; ++k)
      for (int64_t s = 0; s < width; ++s) logs[k * width + s] *= total[s];
  }
};

template <class In>
struct Rounded {
  static FASTCL_HD void run(In* FASTCL_RESTRICT to, const arithmetic_t<In>* FASTCL_RESTRICT from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(to + i, from[i]);
  }
};

Tensor gmm_log_prob(const Tensor& x, const Tensor& means, const Tensor& scale_trils) {
  const char* op = "gmm_log_prob";
  const Covariance covariance = covariance_of(op, means, scale_trils);
  check_matrix(op, "x", x, -1, "N", means.size(1), "D", means, "means");
  const Tensor rows = row_major(x), mu = row_major(means);
  const Tensor l = row_major(scale_trils);
  Tensor out = fresh({x.size(0), means.size(0)}, x.scalar_type());
  dispatch_float(x.scalar_type(), op, "x", [&](auto type) {
    using In = decltype(type);
    using T = arithmetic_t<In>;
    In* to = static_cast<In*>(out.mutable_data_ptr());
    const In* from = static_cast<const In*>(rows.const_data_ptr());
    if (covariance == Covariance::full) {
      const Density<In> density(op, mu, l);
      density.for_each(from, x.size(0), [&](T* logs, int64_t begin, int64_t n) {
        to_rows(to + begin * density.components, logs, density.width, n, density.components);
      });
      return;
    }
    const DiagonalDensity<In> density(op, mu, l, covariance);
    if constexpr (std::is_same_v<In, T>)
      density.template for_each<false>(from, x.size(0), to, [](const T*, int64_t, int64_t) {});
    else
      density.template for_each<false>(from, x.size(0), to, [&](const T* logs, int64_t begin, int64_t n) {
        simd<Rounded<In>>(to + begin * density.components, logs, n * density.components);
      });
  });
  return out;
}

std::tuple<Tensor, Tensor> gmm_responsibilities(const Tensor& x, const Tensor& weights, const Tensor& means,
                                                const Tensor& scale_trils) {
  const char* op = "gmm_responsibilities";
  const Covariance covariance = covariance_of(op, means, scale_trils);
  check_matrix(op, "x", x, -1, "N", means.size(1), "D", means, "means");
  FASTCL_CHECK(weights.is_cpu(), op, ": weights must be a CPU tensor like means");
  check_same_dtype(weights, means, op, "weights", "means");
  FASTCL_CHECK(weights.dim() == 1 && weights.size(0) == means.size(0), op,
               ": weights must be [K] with the K of means, ", means.size(0));
  const Tensor rows = row_major(x), mu = row_major(means);
  const Tensor l = row_major(scale_trils), shares = row_major(weights);
  Tensor responsibilities = fresh({x.size(0), means.size(0)}, x.scalar_type());
  Tensor log_density = fresh({x.size(0)}, x.scalar_type());
  dispatch_float(x.scalar_type(), op, "x", [&](auto type) {
    using In = decltype(type);
    using T = arithmetic_t<In>;
    std::vector<T> log_weights(means.size(0));
    double sum = 0;
    for (size_t k = 0; k < log_weights.size(); ++k) {
      const double w = load(static_cast<const In*>(shares.const_data_ptr()) + k);
      FASTCL_CHECK(w >= 0 && std::isfinite(w), op, ": weights of component ", k, " is ", w,
                   " but must be finite and not negative");
      log_weights[k] = static_cast<T>(std::log(w));
      sum += w;
    }
    FASTCL_CHECK(sum > 0, op, ": weights are all 0");
    In *to = static_cast<In*>(responsibilities.mutable_data_ptr()),
       *log_to = static_cast<In*>(log_density.mutable_data_ptr());
    const int64_t components = means.size(0);
    const auto share = [&](T* logs, int64_t width, int64_t begin, int64_t n) {
      std::vector<T> top(width), total(width);
      simd<Shares<T>>(logs, top.data(), total.data(), static_cast<const T*>(log_weights.data()), components, width);
      to_rows(to + begin * components, logs, width, n, components);
      for (int64_t s = 0; s < n; ++s) store(log_to + begin + s, top[s]);
    };
    const In* from = static_cast<const In*>(rows.const_data_ptr());
    if (covariance == Covariance::full) {
      const Density<In> density(op, mu, l);
      density.for_each(from, x.size(0),
                       [&](T* logs, int64_t begin, int64_t n) { share(logs, density.width, begin, n); });
      return;
    }
    const DiagonalDensity<In> density(op, mu, l, covariance);
    density.template for_each<true>(from, x.size(0), to,
                                    [&](T* logs, int64_t begin, int64_t n) { share(logs, n, begin, n); });
  });
  return {responsibilities, log_density};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("gmm_log_prob", TORCH_BOX(&gmm_log_prob));
  m.impl("gmm_responsibilities", TORCH_BOX(&gmm_responsibilities));
}

}  // namespace fastcl

// gmm_log_prob: log N(x | mu_k, L_k L_k^T) for every sample and component. y = L^-1 (x - mu) is a product of tiles with
// the inverse factor, which is taken once a component in double. gmm_responsibilities: the mixture's density and the
// components' shares of it, EM's E-step, while a block's log densities lie in the cache.
#include <cmath>

#include "../common/lanes.h"
#include "../common/transpose.h"
#include "blocks.h"
#include "deviations.h"
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

// Samples side by side where there is no factor: their sums, six registers of the widest, stay there.
constexpr int kVectors = 6;
template <class T>
constexpr int64_t kLanes = kVectors * 64 / sizeof(T);

// Of a near component y is taken as x inverse - mu inverse, two operations a number instead of three. That rounds mu
// inverse, by at most kNear units of the last place of 1; x and mu count from the components' middle.
constexpr double kNear = 32;

// Memory that is wanted soon, a little at a time: waited for, it took a quarter of the time.
struct Ahead {
  const char *read, *written;
  int64_t read_step, written_step;
  FASTCL_HD void next() {
    for (int64_t byte = 0; byte < read_step; byte += 64) prefetch_later(read + byte);
    for (int64_t byte = 0; byte < written_step; byte += 64) prefetch_later(written + byte);
    read += read_step;
    written += written_step;
  }
};
constexpr int64_t kFeaturesAhead = 4;  // so many for a step of Ahead
constexpr int kAtOnce = 4;             // components: 24 sums in 32 registers

// logs[c][s] = constant[c] - sum_j y^2 / 2, y = (x[j][s] - at[c][j]) inverse[c][j], or near: x[j][s] inverse[c][j] -
// at[c][j]. Several components at once where registers are many: each sum waits for its last addition. Six registers of
// samples to a component rather than three to twice as many: a broadcast serves more of them (a tenth).
template <class T, int count, bool near>
struct ScaledSquares {
  template <int bytes>
  struct Of {
    using Vector = typename Lanes<T, bytes / sizeof(T)>::Vector;
    static constexpr int kWidth = bytes / sizeof(T);

    static FASTCL_HD Ahead run(T* logs, const T* x, const T* at, const T* inverse, const T* constant, int64_t features,
                               Ahead ahead) {
      for (int64_t part = 0; part < kLanes<T>; part += kVectors * kWidth)
        ahead = some(logs + part, x + part, at, inverse, constant, features, ahead);
      return ahead;
    }
    static FASTCL_HD Ahead some(T* logs, const T* x, const T* at, const T* inverse, const T* constant, int64_t features,
                                Ahead ahead) {
      Vector sums[count][kVectors] = {};
      int64_t j = 0;
      do {  // there is one: asked first, gcc would keep the sums in memory too
        if (j % kFeaturesAhead == 0) ahead.next();
        const Vector* values = reinterpret_cast<const Vector*>(x + j * kLanes<T>);
        for (int c = 0; c < count; ++c) {
          const T a = at[c * features + j], scale = inverse[c * features + j];
          for (int v = 0; v < kVectors; ++v) {
            const Vector y = near ? values[v] * scale - a : (values[v] - a) * scale;
            sums[c][v] += y * y;
          }
        }
      } while (++j < features);
      for (int c = 0; c < count; ++c)
        for (int v = 0; v < kVectors; ++v)
          reinterpret_cast<Vector*>(logs + c * kLanes<T>)[v] = -(sums[c][v] * T(0.5) - constant[c]);
      return ahead;
    }
  };
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

template <class T>
struct Nearness {  // scaled[i] = (mu[i] - middle[i]) inverse[i]; whether all are near, which NaN is not
  static FASTCL_HD bool run(T* FASTCL_RESTRICT scaled, const T* FASTCL_RESTRICT mu, const T* FASTCL_RESTRICT middle,
                            const T* FASTCL_RESTRICT inverse, int64_t n) {
    int64_t far = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double y = (double(mu[i]) - double(middle[i])) * double(inverse[i]);
      far += !(abs(y) <= kNear);
      scaled[i] = static_cast<T>(y);
    }
    return far == 0;
  }
};

// Log densities [components][width] of the samples of a block, whose width this knows.
template <class In>
struct Density {
  using T = arithmetic_t<In>;

  const int64_t components, features;
  const bool full;
  const TileChoice<T> tile;
  const int64_t width;
  std::unique_ptr<T[]> mean, inverse, constant, middle;
  std::vector<char> near;  // its mean[] is then (mu - middle) inverse
  bool any_near = false, any_far = true;
  Factors<T> factors;

  Density(const char* op, const Tensor& means, const Tensor& trils, Covariance covariance)
      : components(means.size(0)),
        features(means.size(1)),
        full(covariance == Covariance::full),
        tile(choose_tile<T>()),
        width(full ? tile.nr : kLanes<T>),
        mean(new T[components * features]),
        inverse(new T[full ? 0 : components * features]),
        constant(new T[components]),
        middle(new T[full ? 0 : features]),
        near(components, 0),
        factors(full ? components : 0, features, tile.mr) {
    const In* mu = static_cast<const In*>(means.const_data_ptr());
    const In* l = static_cast<const In*>(trils.const_data_ptr());
    std::vector<char> good(components, 1);
    const int64_t cost = full ? features * features * features / 6 + 1 : features;
    par_for(0, components, std::max<int64_t>(1, 32768 / cost), [&](int64_t first, int64_t last) {
      std::vector<double> factor(full ? features * features : 0), inverted(factor.size());
      std::vector<In> own(features);
      std::vector<T> inverses(features);
      for (int64_t k = first; k < last; ++k) {
        for (int64_t i = 0; i < features; ++i) mean[k * features + i] = load(mu + k * features + i);
        const In* deviations = own.data();
        if (covariance == Covariance::diagonal) deviations = l + k * features;
        if (covariance == Covariance::spherical) std::fill(own.begin(), own.end(), l[k]);
        for (int64_t i = 0; full && i < features; ++i) own[i] = l[(k * features + i) * features + i];
        const Deviations found =
            simd<Invert<T, In>>(full ? inverses.data() : inverse.get() + k * features, deviations, features);
        good[k] = found.good;
        constant[k] = static_cast<T>(-found.log - 0.5 * double(features) * 1.8378770664093453);  // ln 2 pi
        if (!full || !good[k]) continue;
        for (int64_t i = 0; i < features * features; ++i) factor[i] = load(l + k * features * features + i);
        invert(inverted, factor, features);
        for (int64_t i = 0; i < features; ++i)
          for (int64_t j = 0; j <= i; ++j) factors.set(k, i, j, static_cast<T>(inverted[i * features + j]));
      }
    });
    for (int64_t k = 0; k < components; ++k)
      FASTCL_CHECK(good[k], op, ": scale_trils of component ", k, " must have a positive, finite diagonal");
    if (!full) find_near();
  }

  void find_near() {
    std::vector<double> sum(features, 0);
    for (int64_t k = 0; k < components; ++k)
      for (int64_t i = 0; i < features; ++i) sum[i] += mean[k * features + i];
    for (int64_t i = 0; i < features; ++i) middle[i] = static_cast<T>(sum[i] / double(components));
    par_for(0, components, std::max<int64_t>(1, 262144 / features), [&](int64_t first, int64_t last) {
      std::vector<T> scaled(features);
      for (int64_t k = first; k < last; ++k) {
        T* mu = mean.get() + k * features;
        near[k] = simd<Nearness<T>>(scaled.data(), static_cast<const T*>(mu), static_cast<const T*>(middle.get()),
                                    static_cast<const T*>(inverse.get() + k * features), features);
        if (near[k]) std::copy(scaled.begin(), scaled.end(), mu);
      }
    });
    any_near = std::count(near.begin(), near.end(), 1) > 0;
    any_far = std::count(near.begin(), near.end(), 0) > 0;
  }

  // body(logs, begin, samples) for every block of the rows of x; begin + samples is at most n. To `out`, a row of
  // components for each of x, body will write.
  template <class F>
  void for_each(const In* x, int64_t n, const In* out, const F& body) const {
    const int64_t work = width * components * features * (full ? 1 + features / 32 : 1);
#ifdef FASTCL_SMALL_GRAIN
    constexpr int64_t kWork = 1;  // the tests' few blocks go to several threads too
#else
    constexpr int64_t kWork = 131072;
#endif
    const int64_t blocks = ceil_div(n, width), at_once = std::max<int64_t>(1, kWork / work);
    par_tasks(blocks, at_once, [&](Tasks::Share& share) {
      const Aligned<T> block = aligned<T>(any_far ? features * width : 0),
                       shifted = aligned<T>(full || any_near ? features * width : 0);
      const Aligned<T> logs = aligned<T>(components * width);
      for (int64_t b = share.take(), then; b >= 0; b = then) {
        then = share.take();  // a step before, so that its memory is fetched meanwhile
        const int64_t begin = b * width, samples = std::min(width, n - begin), after = then < 0 ? n : then * width;
        const In* rows = x + begin * features;
        if (any_far) transpose(in_full(block.get(), samples), width, rows, features, samples, features);
        if (any_near)
          transpose_less(in_full(shifted.get(), samples), width, rows, features, samples, features, middle.get());
        Ahead ahead = fetching(x + after * features, std::min(n - after, width), out + begin * components, samples);
        for (int64_t k = 0; k < components;)
          k += log_densities(logs.get() + k * width, k, block.get(), shifted.get(), ahead);
        body(logs.get(), begin, samples);
      }
    });
  }

  // A few samples at a time: their rows of `out`, which lie together, are written while they are in the first cache.
  void to_rows(In* out, const T* logs, int64_t samples) const {
    for (int64_t s = 0; s < samples; s += 16)
      transpose(out + s * components, components, logs + s, width, components, std::min<int64_t>(16, samples - s));
  }

  T* in_full(T* block, int64_t samples) const {  // numbers also where there are no samples
    if (samples < width) std::fill_n(block, features * width, T(0));
    return block;
  }

  // The block that comes next and the rows to write. A few components leave no time to fetch them in.
  Ahead fetching(const In* read, int64_t to_read, const In* written, int64_t to_write) const {
    const int64_t steps = ceil_div(features, kFeaturesAhead) * components / kAtOnce;
    const auto step = [&](int64_t numbers) {
      return components < 48 ? 0 : ceil_div(numbers * static_cast<int64_t>(sizeof(In)), steps);
    };
    return {reinterpret_cast<const char*>(read), reinterpret_cast<const char*>(written), step(to_read * features),
            step(to_write * components)};
  }

  // Of component k, and perhaps of some that follow: how many.
  int64_t log_densities(T* logs, int64_t k, const T* block, T* shifted, Ahead& ahead) const {
    if (!full)
      return near[k] ? without_factor<true>(logs, k, shifted, ahead) : without_factor<false>(logs, k, block, ahead);
    simd<Shift<T>>(shifted, block, mean.get() + k * features, features, width);
    tile.triangle_squares(factors.panel(k, 0), features, shifted, logs);
    for (int64_t s = 0; s < width; ++s) logs[s] = constant[k] - T(0.5) * logs[s];
    return 1;
  }

  template <bool is_near>
  int64_t without_factor(T* logs, int64_t k, const T* x, Ahead& ahead) const {
    int64_t alike = 1;
    while (alike < kAtOnce && k + alike < components && (near[k + alike] != 0) == is_near) ++alike;
    if (isa() != Isa::avx512) alike = 1;
    return alike == kAtOnce ? squares<kAtOnce, is_near>(logs, k, x, ahead)
           : alike > 1      ? squares<2, is_near>(logs, k, x, ahead)
                            : squares<1, is_near>(logs, k, x, ahead);
  }

  template <int count, bool is_near>
  int64_t squares(T* logs, int64_t k, const T* x, Ahead& ahead) const {
    ahead = simd_of_width<ScaledSquares<T, count, is_near>::template Of>(
        logs, x, static_cast<const T*>(mean.get() + k * features), static_cast<const T*>(inverse.get() + k * features),
        static_cast<const T*>(constant.get() + k), features, ahead);
    return count;
  }
};

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
    const Density<In> density(op, mu, l, covariance);
    In* to = static_cast<In*>(out.mutable_data_ptr());
    density.for_each(
        static_cast<const In*>(rows.const_data_ptr()), x.size(0), to,
        [&](T* logs, int64_t begin, int64_t n) { density.to_rows(to + begin * density.components, logs, n); });
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
    const Density<In> density(op, mu, l, covariance);
    In *to = static_cast<In*>(responsibilities.mutable_data_ptr()),
       *log_to = static_cast<In*>(log_density.mutable_data_ptr());
    density.for_each(static_cast<const In*>(rows.const_data_ptr()), x.size(0), to,
                     [&](T* logs, int64_t begin, int64_t n) {
                       std::vector<T> top(density.width), total(density.width);
                       simd<Shares<T>>(logs, top.data(), total.data(), static_cast<const T*>(log_weights.data()),
                                       density.components, density.width);
                       density.to_rows(to + begin * density.components, logs, n);
                       for (int64_t s = 0; s < n; ++s) store(log_to + begin + s, top[s]);
                     });
  });
  return {responsibilities, log_density};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("gmm_log_prob", TORCH_BOX(&gmm_log_prob));
  m.impl("gmm_responsibilities", TORCH_BOX(&gmm_responsibilities));
}

}  // namespace fastcl

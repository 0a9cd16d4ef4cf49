// gmm_log_prob: log N(x | mu_k, L_k L_k^T) for every sample and component. y = L^-1 (x - mu) is a product of tiles with
// the inverse factor, which is taken once a component in double.
#include <cmath>

#include "blocks.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "gmm_log_prob";

template <class T, class In>
struct Gather {  // rows of x as [features][width]; beyond `n` zeros
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT x, int64_t n, int64_t features,
                            int64_t width) {
    for (int64_t s = 0; s < width; ++s)
      for (int64_t j = 0; j < features; ++j) to[j * width + s] = s < n ? load(x + s * features + j) : T(0);
  }
};

template <class T>
struct Shift {  // to[j][s] = x[j][s] - mu[j]
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const T* FASTCL_RESTRICT x, const T* FASTCL_RESTRICT mean,
                            int64_t features, int64_t width) {
    for (int64_t j = 0; j < features; ++j)
      for (int64_t s = 0; s < width; ++s) to[j * width + s] = x[j * width + s] - mean[j];
  }
};

template <class T>
struct ScaledSquares {  // total[s] = sum_j ((x[j][s] - mu[j]) inverse[j])^2
  static FASTCL_HD void run(T* FASTCL_RESTRICT total, const T* FASTCL_RESTRICT x, const T* FASTCL_RESTRICT mean,
                            const T* FASTCL_RESTRICT inverse, int64_t features, int64_t width) {
    std::fill_n(total, width, T(0));
    int64_t s = 0;  // pieces of a known length are unrolled: 1.6 times as fast
    for (; s + 48 <= width; s += 48) add<48>(total + s, x + s, mean, inverse, features, width);
    for (; s + 8 <= width; s += 8) add<8>(total + s, x + s, mean, inverse, features, width);
    for (; s < width; s += 4) add<4>(total + s, x + s, mean, inverse, features, width);
  }
  template <int n>
  static FASTCL_HD void add(T* FASTCL_RESTRICT total, const T* FASTCL_RESTRICT x, const T* FASTCL_RESTRICT mean,
                            const T* FASTCL_RESTRICT inverse, int64_t features, int64_t width) {
    for (int64_t j = 0; j < features; ++j)
      for (int s = 0; s < n; ++s) {
        const T y = (x[j * width + s] - mean[j]) * inverse[j];
        total[s] += y * y;
      }
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

template <class In>
void log_prob(In* out, const Tensor& x, const Tensor& means, const Tensor& trils, Covariance covariance) {
  using T = arithmetic_t<In>;
  const int64_t n = x.size(0), components = means.size(0), features = means.size(1);
  const TileChoice<T> tile = choose_tile<T>();
  const bool full = covariance == Covariance::full, diagonal = covariance == Covariance::diagonal;
  const In* mu = static_cast<const In*>(means.const_data_ptr());
  const In* l = static_cast<const In*>(trils.const_data_ptr());
  const In* from = static_cast<const In*>(x.const_data_ptr());
  std::unique_ptr<T[]> mean(new T[components * features]), inverse(new T[full ? 0 : components * features]);
  std::unique_ptr<T[]> constant(new T[components]);
  Factors<T> factors(full ? components : 0, features, tile.mr);
  std::vector<char> good(components, 1);
  const int64_t cost = full ? features * features * features / 6 + 1 : features;
  par_for(0, components, std::max<int64_t>(1, 32768 / cost), [&](int64_t first, int64_t last) {
    std::vector<double> factor(full ? features * features : 0), inverted(factor.size());
    for (int64_t k = first; k < last; ++k) {
      double log_determinant = 0;
      for (int64_t i = 0; i < features; ++i) {
        mean[k * features + i] = load(mu + k * features + i);
        const double deviation = load(full       ? l + (k * features + i) * features + i
                                      : diagonal ? l + k * features + i
                                                 : l + k);
        good[k] = good[k] && deviation > 0 && std::isfinite(deviation);
        log_determinant += std::log(deviation);
        if (!full) inverse[k * features + i] = static_cast<T>(1.0 / deviation);
      }
      constant[k] = static_cast<T>(-log_determinant - 0.5 * double(features) * 1.8378770664093453);  // ln 2 pi
      if (!full || !good[k]) continue;
      for (int64_t i = 0; i < features * features; ++i) factor[i] = load(l + k * features * features + i);
      invert(inverted, factor, features);
      for (int64_t i = 0; i < features; ++i)
        for (int64_t j = 0; j <= i; ++j) factors.set(k, i, j, static_cast<T>(inverted[i * features + j]));
    }
  });
  for (int64_t k = 0; k < components; ++k)
    FASTCL_CHECK(good[k], kOp, ": scale_trils of component ", k, " must have a positive, finite diagonal");

  const int64_t width = tile.nr, work = width * components * features * (full ? 1 + features / 32 : 1);
  par_for(0, ceil_div(n, width), std::max<int64_t>(1, 131072 / work), [&](int64_t first, int64_t last) {
    std::unique_ptr<T[]> block(new T[features * width]), shifted(new T[full ? features * width : 0]);
    std::unique_ptr<T[]> squares(new T[width]);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * width, samples = std::min(width, n - begin);
      simd<Gather<T, In>>(block.get(), from + begin * features, samples, features, width);
      for (int64_t k = 0; k < components; ++k) {
        const T* m = mean.get() + k * features;
        if (!full) {
          simd<ScaledSquares<T>>(squares.get(), block.get(), m, inverse.get() + k * features, features, width);
        } else {
          std::fill_n(squares.get(), width, T(0));
          simd<Shift<T>>(shifted.get(), block.get(), m, features, width);
          for (int64_t q = 0; q < factors.count; ++q)  // row length 0: the rows' squares are added up
            tile.run(factors.panel(k, q), shifted.get(), squares.get(), 0, 1, factors.depth(q), Reduce::square);
        }
        for (int64_t s = 0; s < samples; ++s)
          store(out + (begin + s) * components + k, constant[k] - T(0.5) * squares[s]);
      }
    }
  });
}

Tensor gmm_log_prob(const Tensor& x, const Tensor& means, const Tensor& scale_trils) {
  const Covariance covariance = covariance_of(kOp, means, scale_trils);
  check_matrix(kOp, "x", x, -1, "N", means.size(1), "D", means, "means");
  const Tensor rows = torch::stable::contiguous(x), mu = torch::stable::contiguous(means);
  const Tensor l = torch::stable::contiguous(scale_trils);
  Tensor out = fresh(torch::stable::new_empty(x, {x.size(0), means.size(0)}));
  dispatch_float(x.scalar_type(), kOp, "x", [&](auto type) {
    using In = decltype(type);
    log_prob<In>(static_cast<In*>(out.mutable_data_ptr()), rows, mu, l, covariance);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("gmm_log_prob", TORCH_BOX(&gmm_log_prob)); }

}  // namespace fastcl

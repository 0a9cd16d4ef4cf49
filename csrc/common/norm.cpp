// BatchNorm of rows [C, L], with its first and second derivatives: what a gradient penalty asks for. A row is a channel
// of maps with the batch last (chwn.cpp); each pass over it finds it in the cache.
#include <cmath>
#include <optional>

#include "cpu.h"

namespace fastcl {
namespace {

// out[k] = the sum of values(i)[k]. Partial sums side by side: the loop over them vectorises, and none grows long.
template <class T, int K, class F>
FASTCL_HD void sums_of(double* out, int64_t n, const F& values) {
  constexpr int kParts = 32;
  T part[K][kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int p = 0; p < kParts; ++p) {
      T v[K];
      values(i + p, v);
      for (int k = 0; k < K; ++k) part[k][p] += v[k];
    }
  for (; i < n; ++i) {
    T v[K];
    values(i, v);
    for (int k = 0; k < K; ++k) part[k][0] += v[k];
  }
  for (int k = 0; k < K; ++k) {
    out[k] = 0;
    for (int p = 0; p < kParts; ++p) out[k] += part[k][p];
  }
}

// y = gamma (x - mean) r + beta with r = (variance + eps)^-1/2
template <class T>
struct NormRow {
  static FASTCL_HD void run(T* FASTCL_RESTRICT y, T* mean, T* variance, T* r, const T* FASTCL_RESTRICT x, T gamma,
                            T beta, double eps, int64_t n) {
    double sum[1];
    sums_of<T, 1>(sum, n, [&](int64_t i, T* v) FASTCL_LAMBDA_HD { v[0] = x[i]; });
    const T middle = static_cast<T>(sum[0] / double(n));
    sums_of<T, 1>(sum, n, [&](int64_t i, T* v) FASTCL_LAMBDA_HD { v[0] = (x[i] - middle) * (x[i] - middle); });
    const T inverse = static_cast<T>(1 / sqrt(sum[0] / double(n) + eps)), scale = gamma * inverse;
    for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - middle) * scale + beta;
    *mean = middle;
    *variance = static_cast<T>(sum[0] / double(n));
    *r = inverse;
  }
};

// With P(v) = v - mean(v) - z mean(v z), z = (x - mean) r: gamma r P(g), and the sums of g z and g.
template <class T>
struct NormRowBackward {
  static FASTCL_HD void run(T* FASTCL_RESTRICT of_x, T* of_gamma, T* of_beta, const T* FASTCL_RESTRICT g,
                            const T* FASTCL_RESTRICT x, T mean, T r, T gamma, int64_t n) {
    double sum[2];
    sums_of<T, 2>(sum, n, [&](int64_t i, T* v) FASTCL_LAMBDA_HD {
      v[0] = g[i];
      v[1] = g[i] * ((x[i] - mean) * r);
    });
    const T g_mean = static_cast<T>(sum[0] / double(n)), m = static_cast<T>(sum[1] / double(n)), scale = gamma * r;
    for (int64_t i = 0; i < n; ++i) of_x[i] = scale * (g[i] - g_mean - (x[i] - mean) * r * m);
    *of_beta = static_cast<T>(sum[0]);
    *of_gamma = static_cast<T>(sum[1]);
  }
};

// What h, the gradient of gamma r P(g), and those of the two sums say of g, x and gamma:
//   g: gamma r P(h) + z of_sum + of_mean
//   x: -gamma r^2 (z mean(h P(g)) + mean(g z) P(h) + mean(h z) P(g)) + r of_sum P(g)
template <class T>
struct NormRowTwice {
  static FASTCL_HD void run(T* FASTCL_RESTRICT of_g, T* FASTCL_RESTRICT of_x, T* of_gamma, const T* FASTCL_RESTRICT h,
                            const T* FASTCL_RESTRICT g, const T* FASTCL_RESTRICT x, T mean, T r, T gamma, T of_sum,
                            T of_mean, int64_t n) {
    double s[4];
    sums_of<T, 4>(s, n, [&](int64_t i, T* v) FASTCL_LAMBDA_HD {
      const T z = (x[i] - mean) * r;
      v[0] = g[i];
      v[1] = g[i] * z;
      v[2] = h[i];
      v[3] = h[i] * z;
    });
    const T g_mean = static_cast<T>(s[0] / double(n)), m = static_cast<T>(s[1] / double(n));
    const T h_mean = static_cast<T>(s[2] / double(n)), a = static_cast<T>(s[3] / double(n));
    double sum[1];
    sums_of<T, 1>(sum, n,
                  [&](int64_t i, T* v) FASTCL_LAMBDA_HD { v[0] = h[i] * (g[i] - g_mean - (x[i] - mean) * r * m); });
    const T common = static_cast<T>(sum[0] / double(n)), scale = gamma * r;
    for (int64_t i = 0; i < n; ++i) {
      const T z = (x[i] - mean) * r, of_h = h[i] - h_mean - z * a, p = g[i] - g_mean - z * m;
      of_g[i] = scale * of_h + z * of_sum + of_mean;
      of_x[i] = r * (of_sum * p - scale * (z * common + m * of_h + a * p));
    }
    *of_gamma = static_cast<T>(sum[0]) * r;
  }
};

// f(row, the row's gamma) for every row, on several threads.
template <class T, class F>
void for_rows(const Tensor& x, const T* gamma, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, x.size(1)));
  par_pieces(x.size(0), grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) f(row, gamma == nullptr ? T(1) : gamma[row]);
  });
}

void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  FASTCL_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1) && t.size(1) > 0, op,
               ": ", name, " must be a CPU tensor [C, L], not empty, of the size of x");
  FASTCL_CHECK(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double, op, ": ", name,
               " must be float32 or float64");
  check_same_dtype(t, x, op, name, "x");
}
void check_column(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  FASTCL_CHECK(t.is_cpu() && t.dim() == 1 && t.size(0) == x.size(0), op, ": ", name,
               " must be a CPU tensor with a number for each row of x");
  check_same_dtype(t, x, op, name, "x");
}

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* written(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class F>
void dispatch(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

using Optional = std::optional<Tensor>;
Optional dense(const char* op, const char* name, const Optional& t, const Tensor& x) {
  if (!t) return std::nullopt;
  check_column(op, name, *t, x);
  return row_major(*t);
}
template <class T>
const T* read(const Optional& t) {
  return t ? read<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chwn_norm(const Tensor& x, const Optional& weight, const Optional& bias,
                                                     double eps) {
  const char* op = "chwn_norm";
  check_rows(op, "x", x, x);
  const Optional gamma = dense(op, "weight", weight, x), beta = dense(op, "bias", bias, x);
  const Tensor rows = row_major(x);
  const auto column = [&] { return fresh({x.size(0)}, x.scalar_type()); };
  Tensor y = fresh({x.size(0), x.size(1)}, x.scalar_type()), mean = column(), variance = column(), r = column();
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const int64_t n = x.size(1);
    const T *b = read<T>(beta), *from = read<T>(rows);
    T *to = written<T>(y), *means = written<T>(mean), *variances = written<T>(variance), *inverses = written<T>(r);
    for_rows(x, read<T>(gamma), [&](int64_t row, T g) {
      simd<NormRow<T>>(to + row * n, means + row, variances + row, inverses + row, from + row * n, g,
                       b == nullptr ? T(0) : b[row], eps, n);
    });
  });
  return {y, mean, variance, r};
}

std::tuple<Tensor, Tensor, Tensor> chwn_norm_backward(const Tensor& g, const Tensor& x, const Optional& weight,
                                                      const Tensor& mean, const Tensor& r) {
  const char* op = "chwn_norm_backward";
  check_rows(op, "x", x, x);
  check_rows(op, "g", g, x);
  const Optional gamma = dense(op, "weight", weight, x), means = dense(op, "mean", mean, x), rs = dense(op, "r", r, x);
  const Tensor rows = row_major(x), above = row_major(g);
  const auto column = [&] { return fresh({x.size(0)}, x.scalar_type()); };
  Tensor of_x = fresh({x.size(0), x.size(1)}, x.scalar_type()), of_gamma = column(), of_beta = column();
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const int64_t n = x.size(1);
    const T *from = read<T>(rows), *gs = read<T>(above), *mu = read<T>(means), *inverses = read<T>(rs);
    T *to = written<T>(of_x), *gammas = written<T>(of_gamma), *betas = written<T>(of_beta);
    for_rows(x, read<T>(gamma), [&](int64_t row, T scale) {
      simd<NormRowBackward<T>>(to + row * n, gammas + row, betas + row, gs + row * n, from + row * n, mu[row],
                               inverses[row], scale, n);
    });
  });
  return {of_x, of_gamma, of_beta};
}

std::tuple<Tensor, Tensor, Tensor> chwn_norm_twice(const Tensor& h, const Tensor& of_sum, const Tensor& of_mean,
                                                   const Tensor& g, const Tensor& x, const Optional& weight,
                                                   const Tensor& mean, const Tensor& r) {
  const char* op = "chwn_norm_twice";
  check_rows(op, "x", x, x);
  check_rows(op, "g", g, x);
  check_rows(op, "h", h, x);
  const Optional gamma = dense(op, "weight", weight, x), means = dense(op, "mean", mean, x), rs = dense(op, "r", r, x);
  const Optional sums = dense(op, "of_sum", of_sum, x), totals = dense(op, "of_mean", of_mean, x);
  const Tensor rows = row_major(x), above = row_major(g);
  const Tensor upper = row_major(h);
  const auto like = [&] { return fresh({x.size(0), x.size(1)}, x.scalar_type()); };
  Tensor of_g = like(), of_x = like(), of_gamma = fresh({x.size(0)}, x.scalar_type());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    const int64_t n = x.size(1);
    const T *from = read<T>(rows), *gs = read<T>(above), *hs = read<T>(upper), *mu = read<T>(means);
    const T *inverses = read<T>(rs), *sum = read<T>(sums), *total = read<T>(totals);
    T *to_g = written<T>(of_g), *to_x = written<T>(of_x), *gammas = written<T>(of_gamma);
    for_rows(x, read<T>(gamma), [&](int64_t row, T scale) {
      const int64_t at = row * n;
      simd<NormRowTwice<T>>(to_g + at, to_x + at, gammas + row, hs + at, gs + at, from + at, mu[row], inverses[row],
                            scale, sum[row], total[row], n);
    });
  });
  return {of_g, of_x, of_gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("chwn_norm", TORCH_BOX(&chwn_norm));
  m.impl("chwn_norm_backward", TORCH_BOX(&chwn_norm_backward));
  m.impl("chwn_norm_twice", TORCH_BOX(&chwn_norm_twice));
}

}  // namespace fastcl

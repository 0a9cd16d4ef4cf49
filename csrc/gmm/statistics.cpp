// Zeroth, first and second moments of weighted samples about a centre for each component: EM's M-step, the Gaussians of
// labelled latents, and the gradients of gmm_log_prob. No [N, K, D] and no [N, D, D].
#include "../common/lanes.h"
#include "blocks.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr int64_t kRows = 960;    // summed in the arithmetic type, then added up in double
constexpr int64_t kCached = 120;  // of them in the second-level cache at once

// rows [n][width] of w (x - c), or of x - c without weights, zero beyond `features`.
template <class T, class In, bool weighted>
struct PackRows {
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT x, const int64_t* rows,
                            const T* FASTCL_RESTRICT weights, const T* FASTCL_RESTRICT centre, int64_t first, int64_t n,
                            int64_t feature, int64_t used, int64_t width, int64_t features) {
    for (int64_t s = 0; s < n; ++s, to += width) {
      const In* row = x + (rows == nullptr ? first + s : rows[first + s]) * features + feature;
      const T w = weighted ? weights[s] : T(1);
      for (int64_t i = 0; i < used; ++i) to[i] = (load(row + i) - centre[feature + i]) * w;
      for (int64_t i = used; i < width; ++i) to[i] = T(0);
    }
  }
};

template <class T>
struct Total {
  static FASTCL_HD double run(const T* weights, int64_t n) {
    double parts[8] = {}, all = 0;  // one sum would wait for each addition
    int64_t s = 0;
    for (; s + 8 <= n; s += 8)
      for (int j = 0; j < 8; ++j) parts[j] += weights[s + j];
    for (; s < n; ++s) parts[0] += weights[s];
    for (double part : parts) all += part;
    return all;
  }
};

// s1 = sum of w d and, for a diagonal covariance, s2 = sum of w d^2 with d = x - c, over n rows of so many features as
// have sums that stay in registers.
template <class T, bool second>
struct Moments {
  static constexpr int kVectors = 4;
  static int64_t features() { return kVectors * vector_bytes() / static_cast<int64_t>(sizeof(T)); }

  template <int bytes>
  struct Of {
    static FASTCL_HD void run(T* s1, T* s2, const T* rows, const T* weights, const T* centre, int64_t n) {
      constexpr int lanes = bytes / static_cast<int>(sizeof(T));
      using Vector = typename Lanes<T, lanes>::Vector;
      Vector sum1[kVectors] = {}, sum2[kVectors] = {}, middle[kVectors];
      for (int v = 0; v < kVectors; ++v) middle[v] = *reinterpret_cast<const Vector*>(centre + v * lanes);
      for (int64_t s = 0; s < n; ++s, rows += kVectors * lanes)
        for (int v = 0; v < kVectors; ++v) {
          const Vector d = *reinterpret_cast<const Vector*>(rows + v * lanes) - middle[v], wd = d * weights[s];
          sum1[v] += wd;
          if (second) sum2[v] += wd * d;
        }
      for (int v = 0; v < kVectors; ++v) {
        *reinterpret_cast<Vector*>(s1 + v * lanes) = sum1[v];
        if (second) *reinterpret_cast<Vector*>(s2 + v * lanes) = sum2[v];
      }
    }
  };
};

template <class T, class In>
struct Columns {  // to[k][s] = r[s, k], or 1 without responsibilities
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT r, int64_t first, int64_t n,
                            int64_t columns, int64_t components) {
    if (r == nullptr) {
      for (int64_t k = 0; k < columns; ++k) std::fill_n(to + k * kRows, n, T(1));
      return;
    }
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) some<8>(to + k * kRows, r + first * components + k, n, components);
    for (; k < columns; ++k) some<1>(to + k * kRows, r + first * components + k, n, components);
  }
  template <int width>  // columns at a time, so that a cache line is read once
  static FASTCL_HD void some(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT r, int64_t n, int64_t components) {
    for (int64_t s = 0; s < n; ++s)
      for (int j = 0; j < width; ++j) to[j * kRows + s] = static_cast<T>(load(r + s * components + j));
  }
};

// The samples of a component: all of them with weights, or those of its label.
struct Members {
  const int64_t* rows = nullptr;  // null: 0 ... n
  int64_t n = 0;
};

template <class In>
struct Statistics {
  using T = arithmetic_t<In>;
  const In* x;
  int64_t features, components;
  std::unique_ptr<T[]> centres;
  const In* responsibilities;  // [N, K] or null
  std::vector<Members> members;
  double *s0, *s1, *s2;
  bool full;

  void weights_of(T* to, int64_t k, int64_t columns, int64_t first, int64_t n) const {
    simd<Columns<T, In>>(to, responsibilities == nullptr ? responsibilities : responsibilities + k, first, n, columns,
                         components);
  }

  // Of components k ... last, which read the same rows where each has all of them.
  template <bool second>
  void moments(int64_t k, int64_t last) const {
    const Members& m = members[k];
    const int64_t width = Moments<T, second>::features();
    // a piece of so many rows stays in the first-level cache while every component passes over it
    const int64_t cached = std::min(kRows, 24576 / (width * int64_t(sizeof(T))));
    const Aligned<T> weights = aligned<T>((last - k) * kRows), rows = aligned<T>(cached * width);
    const Aligned<T> sums = aligned<T>(2 * width);
    const std::unique_ptr<T[]> as_it_is(new T[features]());
    for (int64_t begin = 0; begin < m.n; begin += cached) {
      const int64_t n = std::min(cached, m.n - begin);
      weights_of(weights.get(), k, last - k, begin, n);
      const auto of = [&](int64_t c) { return static_cast<const T*>(weights.get() + (c - k) * kRows); };
      for (int64_t c = k; c < last; ++c) s0[c] += simd<Total<T>>(of(c), n);
      for (int64_t i0 = 0; i0 < features; i0 += width) {
        const int64_t used = std::min(width, features - i0);
        simd<PackRows<T, In, false>>(rows.get(), x, m.rows, of(k), static_cast<const T*>(as_it_is.get()), begin, n, i0,
                                     used, width, features);
        for (int64_t c = k; c < last; ++c) {
          simd_of_width<Moments<T, second>::template Of>(sums.get(), sums.get() + width,
                                                         static_cast<const T*>(rows.get()), of(c),
                                                         static_cast<const T*>(centres.get() + c * features + i0), n);
          for (int64_t i = 0; i < used; ++i) s1[c * features + i0 + i] += sums[i];
          for (int64_t i = 0; second && i < used; ++i) s2[c * features + i0 + i] += sums[width + i];
        }
      }
    }
  }

  // Component k's second moment, rows up to the diagonal (it is symmetric), of every parts-th panel of columns.
  void outer(const TileChoice<T>& tile, int64_t k, int64_t part, int64_t parts) const {
    const Members& m = members[k];
    const int64_t lines = ceil_div(features, tile.mr) * tile.mr, columns = ceil_div(features, tile.nr) * tile.nr;
    const int64_t length = std::max(lines, columns) + 64 / int64_t(sizeof(T));  // not a power of 2: lines of one set
    const Aligned<T> weights = aligned<T>(kRows), sums = aligned<T>(lines * columns);
    const Aligned<T> rows = aligned<T>(kCached * length), weighted = aligned<T>(kCached * length);
    std::fill_n(sums.get(), lines * columns, T(0));
    const T *centre = centres.get() + k * features, *w = weights.get();
    for (int64_t begin = 0; begin < m.n; begin += kCached) {
      const int64_t n = std::min(kCached, m.n - begin);
      weights_of(weights.get(), k, 1, begin, n);
      simd<PackRows<T, In, false>>(rows.get(), x, m.rows, w, centre, begin, n, 0, features, length, features);
      simd<PackRows<T, In, true>>(weighted.get(), x, m.rows, w, centre, begin, n, 0, features, length, features);
      for (int64_t i0 = part * tile.nr; i0 < features; i0 += parts * tile.nr)
        for (int64_t j0 = 0; j0 < std::min(features, i0 + tile.nr); j0 += tile.mr)
          tile.add_rows(weighted.get() + j0, length, rows.get() + i0, length, sums.get() + j0 * columns + i0, columns,
                        n);
      if (begin / kCached % (kRows / kCached) != kRows / kCached - 1 && begin + n < m.n) continue;
      for (int64_t i0 = part * tile.nr; i0 < features; i0 += parts * tile.nr)
        for (int64_t j = 0; j < std::min(features, i0 + tile.nr); ++j)
          for (int64_t i = i0; i < std::min(features, i0 + tile.nr); ++i)
            s2[(k * features + j) * features + i] += sums[j * columns + i];
      std::fill_n(sums.get(), lines * columns, T(0));
    }
  }

  void run() const {
    const TileChoice<T> tile = choose_tile<T>();
    par_for(0, components, 1, [&](int64_t first, int64_t last) {
      const auto some = [&](int64_t k, int64_t end) { full ? moments<false>(k, end) : moments<true>(k, end); };
      if (responsibilities != nullptr) return some(first, last);
      for (int64_t k = first; k < last; ++k) some(k, k + 1);
    });
    if (!full) return;
    // a component is one task, which lays its rows out once; a few components are more
    const int64_t parts = std::min(ceil_div(features, tile.nr), ceil_div(16, components));
    par_tasks(components * parts, 1, [&](Tasks::Share& share) {
      for (int64_t task; (task = share.take()) >= 0;) outer(tile, task / parts, task % parts, parts);
    });
    par_for(0, components, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k) {
        double* s = s2 + k * features * features;
        for (int64_t j = 0; j < features; ++j)
          for (int64_t i = 0; i < j; ++i) s[j * features + i] = s[i * features + j];
      }
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> statistics(const char* op, const Tensor& x, const Tensor& centers, bool full,
                                              const Tensor* responsibilities, const Tensor* labels) {
  FASTCL_CHECK(centers.is_cpu(), op, ": centers must be a CPU tensor like x");
  FASTCL_CHECK(centers.dim() == 2 && centers.size(0) > 0 && centers.size(1) > 0, op,
               ": centers must be [K, D] with at least one component and one feature");
  dispatch_float(x.scalar_type(), op, "x", [](auto) {});
  check_same_dtype(centers, x, op, "centers", "x");
  const int64_t components = centers.size(0), features = centers.size(1);
  check_matrix(op, "x", x, -1, "N", features, "D", centers, "centers");
  if (responsibilities != nullptr)
    check_matrix(op, "responsibilities", *responsibilities, x.size(0), "N", components, "K", x, "x and centers");
  const Tensor rows = row_major(x), middle = row_major(centers);
  const Tensor weights = responsibilities == nullptr ? rows : row_major(*responsibilities);
  std::unique_ptr<Grouped> groups;
  if (labels != nullptr) {
    FASTCL_CHECK(labels->dim() == 1 && labels->size(0) == x.size(0), op,
                 ": labels must have one label for each of the ", x.size(0), " samples of x");
    groups = std::make_unique<Grouped>(op, *labels, components);
  }
  const auto zeros = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::fill_(fresh(sizes, ScalarType::Double), 0.0);
  };
  Tensor s0 = zeros({components}), s1 = zeros({components, features});
  Tensor s2 = full ? zeros({components, features, features}) : zeros({components, features});
  dispatch_float(x.scalar_type(), op, "x", [&](auto type) {
    using In = decltype(type);
    Statistics<In> s;
    s.x = static_cast<const In*>(rows.const_data_ptr());
    s.features = features;
    s.components = components;
    s.centres.reset(new arithmetic_t<In>[components * features + Moments<arithmetic_t<In>, true>::features()]());
    for (int64_t i = 0; i < components * features; ++i)
      s.centres[i] = load(static_cast<const In*>(middle.const_data_ptr()) + i);
    s.responsibilities = responsibilities == nullptr ? nullptr : static_cast<const In*>(weights.const_data_ptr());
    for (int64_t k = 0; k < components; ++k) {
      if (groups)
        s.members.push_back({groups->order.get() + groups->begin[k], groups->begin[k + 1] - groups->begin[k]});
      else
        s.members.push_back({nullptr, x.size(0)});
    }
    s.s0 = static_cast<double*>(s0.mutable_data_ptr());
    s.s1 = static_cast<double*>(s1.mutable_data_ptr());
    s.s2 = static_cast<double*>(s2.mutable_data_ptr());
    s.full = full;
    s.run();
  });
  return {s0, s1, s2};
}

std::tuple<Tensor, Tensor, Tensor> gmm_statistics(const Tensor& x, const Tensor& responsibilities,
                                                  const Tensor& centers, bool full) {
  return statistics("gmm_statistics", x, centers, full, &responsibilities, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> gmm_class_statistics(const Tensor& x, const Tensor& labels, const Tensor& centers,
                                                        bool full) {
  return statistics("gmm_class_statistics", x, centers, full, nullptr, &labels);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("gmm_statistics", TORCH_BOX(&gmm_statistics));
  m.impl("gmm_class_statistics", TORCH_BOX(&gmm_class_statistics));
}

}  // namespace fastcl

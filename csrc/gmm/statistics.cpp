// Zeroth, first and second moments of weighted samples about a centre for each component: EM's M-step, the Gaussians of
// labelled latents, and the gradients of gmm_log_prob. No [N, K, D] and no [N, D, D].
#include "blocks.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr int64_t kRows =
    960;  // summed in the arithmetic type, then added up in double; about a first-level cache of narrow rows

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

template <class T, class In, bool second>
struct Moments {  // sum of w, w d and, for a diagonal covariance, w d^2 with d = x - c
  static FASTCL_HD double run(T* FASTCL_RESTRICT s1, T* FASTCL_RESTRICT s2, const In* FASTCL_RESTRICT x,
                              const int64_t* rows, const T* FASTCL_RESTRICT weights, const T* FASTCL_RESTRICT centre,
                              int64_t first, int64_t n, int64_t features) {
    double total = 0;
    for (int64_t s = 0; s < n; ++s) total += weights[s];
    const auto row = [&](int64_t s)
                         FASTCL_LAMBDA_HD { return x + (rows == nullptr ? first + s : rows[first + s]) * features; };
    int64_t s = 0;
    for (; s + 4 <= n; s += 4) {  // four rows a turn: the sums are loaded and stored a quarter as often
      const In *x0 = row(s), *x1 = row(s + 1), *x2 = row(s + 2), *x3 = row(s + 3);
      const T w0 = weights[s], w1 = weights[s + 1], w2 = weights[s + 2], w3 = weights[s + 3];
      for (int64_t i = 0; i < features; ++i) {
        const T c = centre[i];
        const T d0 = load(x0 + i) - c, d1 = load(x1 + i) - c, d2 = load(x2 + i) - c, d3 = load(x3 + i) - c;
        s1[i] += (w0 * d0 + w1 * d1) + (w2 * d2 + w3 * d3);
        if (second) s2[i] += (w0 * d0 * d0 + w1 * d1 * d1) + (w2 * d2 * d2 + w3 * d3 * d3);
      }
    }
    for (; s < n; ++s)
      for (int64_t i = 0; i < features; ++i) {
        const T d = load(row(s) + i) - centre[i];
        s1[i] += weights[s] * d;
        if (second) s2[i] += weights[s] * d * d;
      }
    return total;
  }
};

template <class T, class In>
struct Columns {  // to[k][s] = r[s, k], or 1 without responsibilities
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT r, int64_t first, int64_t n,
                            int64_t columns, int64_t components) {
    for (int64_t k = 0; k < columns; ++k)
      for (int64_t s = 0; s < n; ++s)
        to[k * kRows + s] = r == nullptr ? T(1) : static_cast<T>(load(r + (first + s) * components + k));
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
  void moments(int64_t k, int64_t last) const {
    const Members& m = members[k];
    std::unique_ptr<T[]> weights(new T[(last - k) * kRows]), sums(new T[2 * features]);
    T *first_moment = sums.get(), *second_moment = first_moment + features;
    for (int64_t begin = 0; begin < m.n; begin += kRows) {
      const int64_t n = std::min(kRows, m.n - begin);
      weights_of(weights.get(), k, last - k, begin, n);
      for (int64_t c = k; c < last; ++c) {
        std::fill_n(sums.get(), 2 * features, T(0));
        const T *w = weights.get() + (c - k) * kRows, *centre = centres.get() + c * features;
        s0[c] +=
            full ? simd<Moments<T, In, false>>(first_moment, second_moment, x, m.rows, w, centre, begin, n, features)
                 : simd<Moments<T, In, true>>(first_moment, second_moment, x, m.rows, w, centre, begin, n, features);
        for (int64_t i = 0; i < features; ++i) s1[c * features + i] += first_moment[i];
        for (int64_t i = 0; !full && i < features; ++i) s2[c * features + i] += second_moment[i];
      }
    }
  }

  // The columns i0 ... i0 + nr of component k's second moment, rows 0 ... i0 + nr (it is symmetric).
  void outer(const TileChoice<T>& tile, int64_t k, int64_t i0) const {
    const Members& m = members[k];
    const int64_t columns = std::min<int64_t>(tile.nr, features - i0), lines = i0 + columns;
    const int64_t panels = ceil_div(lines, tile.mr);
    std::unique_ptr<T[]> weights(new T[kRows]), a(new T[kRows * tile.nr]), g(new T[kRows * tile.mr]);
    std::unique_ptr<T[]> sum(new T[tile.mr * tile.nr]);
    const T* centre = centres.get() + k * features;
    for (int64_t begin = 0; begin < m.n; begin += kRows) {
      const int64_t n = std::min(kRows, m.n - begin);
      weights_of(weights.get(), k, 1, begin, n);
      const T* w = weights.get();
      simd<PackRows<T, In, false>>(a.get(), x, m.rows, w, centre, begin, n, i0, columns, int64_t(tile.nr), features);
      for (int64_t q = 0; q < panels; ++q) {
        const int64_t j0 = q * tile.mr, used = std::min<int64_t>(tile.mr, lines - j0);
        simd<PackRows<T, In, true>>(g.get(), x, m.rows, w, centre, begin, n, j0, used, int64_t(tile.mr), features);
        std::fill_n(sum.get(), tile.mr * tile.nr, T(0));
        tile.run(g.get(), a.get(), sum.get(), tile.nr, 1, n, Reduce::plain);
        for (int64_t j = 0; j < used; ++j)
          for (int64_t i = 0; i < columns; ++i) s2[(k * features + j0 + j) * features + i0 + i] += sum[j * tile.nr + i];
      }
    }
  }

  void run() const {
    const TileChoice<T> tile = choose_tile<T>();
    par_for(0, components, 1, [&](int64_t first, int64_t last) {
      if (responsibilities != nullptr) return moments(first, last);
      for (int64_t k = first; k < last; ++k) moments(k, k + 1);
    });
    if (!full) return;
    const int64_t panels = ceil_div(features, tile.nr);
    par_for(0, components * panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) outer(tile, task / panels, task % panels * tile.nr);
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
  const Tensor rows = torch::stable::contiguous(x), middle = torch::stable::contiguous(centers);
  const Tensor weights = responsibilities == nullptr ? rows : torch::stable::contiguous(*responsibilities);
  std::unique_ptr<Grouped> groups;
  if (labels != nullptr) {
    FASTCL_CHECK(labels->dim() == 1 && labels->size(0) == x.size(0), op,
                 ": labels must have one label for each of the ", x.size(0), " samples of x");
    groups = std::make_unique<Grouped>(op, *labels, components);
  }
  const auto zeros = [&](std::vector<int64_t> sizes) {
    return torch::stable::fill_(torch::stable::new_empty(x, sizes, ScalarType::Double), 0.0);
  };
  Tensor s0 = zeros({components}), s1 = zeros({components, features});
  Tensor s2 = full ? zeros({components, features, features}) : zeros({components, features});
  dispatch_float(x.scalar_type(), op, "x", [&](auto type) {
    using In = decltype(type);
    Statistics<In> s;
    s.x = static_cast<const In*>(rows.const_data_ptr());
    s.features = features;
    s.components = components;
    s.centres.reset(new arithmetic_t<In>[components * features]);
    for (int64_t i = 0; i < components * features; ++i)
      s.centres[i] = load(static_cast<const In*>(middle.const_data_ptr()) + i);
    s.responsibilities = responsibilities == nullptr ? nullptr : static_cast<const In*>(weights.const_data_ptr());
    for (int64_t k = 0; k < components; ++k) {
      if (groups)
        s.members.push_back({groups->order.data() + groups->begin[k], groups->begin[k + 1] - groups->begin[k]});
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

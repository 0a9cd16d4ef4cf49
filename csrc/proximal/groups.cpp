// Norms of a tensor's slices along one dimension (a unit's weights): how far they drifted, and group lasso's step.
#include <cmath>

#include "../common/cpu.h"
#include "math.h"

namespace fastcl {
namespace {

// A tensor without gaps as [outer, groups, inner] in its memory order.
struct View {
  int64_t outer, groups, inner;
};

View view_of(const Tensor& t, int64_t dim) {
  const int64_t groups = t.size(dim), numel = t.numel();
  if (groups <= 1 || numel == 0) return {1, groups, groups ? numel / groups : 0};
  return {numel / (groups * t.stride(dim)), groups, t.stride(dim)};
}

// sums[g] += sum of (w - a)^2 over rows [outer, groups, inner], in double: the order of summation is fixed.
template <class T, bool kDrift>
struct SumSquares {
  static FASTCL_HD void run(double* FASTCL_RESTRICT sums, const T* FASTCL_RESTRICT w, const T* FASTCL_RESTRICT a,
                            int64_t outer, int64_t groups, int64_t inner) {
    const auto square = [&](int64_t i) FASTCL_LAMBDA_HD {
      double d = load(w + i);
      if constexpr (kDrift) d -= load(a + i);
      return d * d;
    };
    for (int64_t row = 0; row < outer; ++row, w += groups * inner, a += kDrift ? groups * inner : 0) {
      if (inner == 1) {
        for (int64_t g = 0; g < groups; ++g) sums[g] += square(g);
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        double lane[kLanes] = {};
        int64_t i = 0;
        for (; i + kLanes <= inner; i += kLanes)
          for (int l = 0; l < kLanes; ++l) lane[l] += square(g * inner + i + l);
        for (; i < inner; ++i) lane[i % kLanes] += square(g * inner + i);
        sums[g] += sum_lanes(lane);
      }
    }
  }
};

template <class T>
struct ScaleGroups {
  static FASTCL_HD void run(T* FASTCL_RESTRICT w, const double* FASTCL_RESTRICT scale, int64_t outer, int64_t groups,
                            int64_t inner) {
    using A = arithmetic_t<T>;
    for (int64_t row = 0; row < outer; ++row, w += groups * inner) {
      if (inner == 1) {
        for (int64_t g = 0; g < groups; ++g) store(w + g, load(w + g) * static_cast<A>(scale[g]));
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        const A s = static_cast<A>(scale[g]);
        for (int64_t i = 0; i < inner; ++i) store(w + g * inner + i, load(w + g * inner + i) * s);
      }
    }
  }
};

// f(group begin, end, row begin, end, block): pieces of about a chunk, whatever the number of threads. With several
// rows the groups stay whole, and each block of rows has sums of its own.
template <class F>
void for_blocks(const View& view, int64_t rows_a_block, const F& f) {
  constexpr int64_t kChunk = VirtualArray::kChunk;
  if (view.outer == 1) {
    const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, view.inner));
    const int64_t blocks = (view.groups + step - 1) / step;
    return par_tasks(blocks, blocks <= 2 ? blocks : 1, [&](Tasks::Share& share) {
      for (int64_t b; (b = share.take()) >= 0;) f(b * step, std::min(view.groups, (b + 1) * step), 0, 1, 0);
    });
  }
  const int64_t blocks = (view.outer + rows_a_block - 1) / rows_a_block;
  par_tasks(blocks, blocks <= 2 ? blocks : 1, [&](Tasks::Share& share) {
    for (int64_t b; (b = share.take()) >= 0;)
      f(0, view.groups, b * rows_a_block, std::min(view.outer, (b + 1) * rows_a_block), b);
  });
}

int64_t rows_a_block(const View& view) {
  return std::max<int64_t>(1, 2 * VirtualArray::kChunk / std::max<int64_t>(1, view.groups * view.inner));
}

// ||w_g - a_g|| for every g; `a` null: ||w_g||.
template <class T>
std::vector<double> norms(const T* w, const T* a, const View& view) {
  std::vector<double> result(view.groups, 0.0);
  if (view.groups == 0 || view.inner == 0 || view.outer == 0) return result;
  const int64_t rows = rows_a_block(view), blocks = view.outer == 1 ? 1 : (view.outer + rows - 1) / rows;
  std::vector<double> sums(blocks * view.groups, 0.0);
  for_blocks(view, rows, [&](int64_t g, int64_t g_end, int64_t row, int64_t row_end, int64_t block) {
    const int64_t at = row * view.groups * view.inner + g * view.inner;
    double* to = sums.data() + block * view.groups + g;
    if (a)
      simd<SumSquares<T, true>>(to, w + at, a + at, row_end - row, g_end - g, view.inner);
    else
      simd<SumSquares<T, false>>(to, w + at, static_cast<const T*>(nullptr), row_end - row, g_end - g, view.inner);
  });
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t g = 0; g < view.groups; ++g) result[g] += sums[b * view.groups + g];
  for (double& r : result) r = std::sqrt(r);
  return result;
}

void check_dim(const Tensor& t, int64_t dim, const char* op, Name name) {
  FASTCL_CHECK(dim >= 0 && dim < t.dim(), op, ": dim is ", dim, " but ", name, " has ", t.dim(), " dimensions");
}

void group_soft_threshold_(const Tensors& tensors, double threshold, int64_t dim) {
  const char* op = "group_soft_threshold_";
  FASTCL_CHECK(threshold >= 0, op, ": threshold is ", threshold, " but must not be negative or NaN");
  for (size_t i = 0; i < tensors.size(); ++i) {
    check_output(tensors[i], op, item("tensors", i));
    dispatch_float(tensors[i].scalar_type(), op, item("tensors", i), [](auto) {});
    check_dim(tensors[i], dim, op, item("tensors", i));
  }
  check_distinct(tensors, {}, op, "tensors", {});
  Addresses outputs = Addresses::outputs(tensors);
  // All norms before the first write: a vector that cannot be allocated then leaves every tensor as it was.
  std::vector<std::vector<double>> scales;
  for (size_t i = 0; i < tensors.size(); ++i)
    dispatch_float(outputs.dtype(i), op, "tensors", [&](auto type) {
      using T = decltype(type);
      scales.push_back(norms<T>(outputs.at<T>(i, 0), nullptr, view_of(outputs.tensor(i), dim)));
      for (double& s : scales[i]) s = group_scale(s, threshold);
    });
  for (size_t i = 0; i < tensors.size(); ++i)
    dispatch_float(outputs.dtype(i), op, "tensors", [&](auto type) {
      using T = decltype(type);
      T* w = outputs.at<T>(i, 0);
      const View view = view_of(outputs.tensor(i), dim);
      if (view.groups == 0 || view.inner == 0) return;
      for_blocks(view, rows_a_block(view), [&](int64_t g, int64_t g_end, int64_t row, int64_t row_end, int64_t) {
        simd<ScaleGroups<T>>(w + row * view.groups * view.inner + g * view.inner, scales[i].data() + g, row_end - row,
                             g_end - g, view.inner);
      });
    });
  outputs.finish();
}

Tensors drift_norms(Tensors tensors, const Tensors& anchors, int64_t dim) {
  const char* op = "drift_norms";
  check_lengths(anchors.size(), tensors.size(), op, "anchors", "tensors");
  for (size_t i = 0; i < tensors.size(); ++i) {
    FASTCL_CHECK(tensors[i].is_cpu(), op, ": ", item("tensors", i), " must be a CPU tensor");
    dispatch_float(tensors[i].scalar_type(), op, item("tensors", i), [](auto) {});
    check_dim(tensors[i], dim, op, item("tensors", i));
    check_like(anchors[i], tensors[i], op, item("anchors", i), item("tensors", i));
    check_same_dtype(anchors[i], tensors[i], op, item("anchors", i), item("tensors", i));
  }
  Tensors found;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor w = without_gaps(tensors[i]), a = in_layout_of(anchors[i], w);
    const bool wide = w.scalar_type() == ScalarType::Double;
    found.push_back(fresh({w.size(dim)}, wide ? ScalarType::Double : ScalarType::Float));
    dispatch_float(w.scalar_type(), op, "tensors", [&](auto type) {
      using T = decltype(type);
      const std::vector<double> n = norms<T>(static_cast<const T*>(w.const_data_ptr()),
                                             static_cast<const T*>(a.const_data_ptr()), view_of(w, dim));
      for (size_t g = 0; g < n.size(); ++g)
        if (wide)
          static_cast<double*>(found[i].mutable_data_ptr())[g] = n[g];
        else
          static_cast<float*>(found[i].mutable_data_ptr())[g] = static_cast<float>(n[g]);
    });
  }
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("group_soft_threshold_", TORCH_BOX(&group_soft_threshold_));
  m.impl("drift_norms", TORCH_BOX(&drift_norms));
}

}  // namespace fastcl

// W o m with an embedding for every unit: masks and slopes once a unit, then W is scaled by them, and the embedding's
// gradient is each unit's sum of g w. Sums are taken in an order that the thread count does not change.
#pragma once
#include <algorithm>
#include <numeric>
#include <vector>

#include "../common/cpu.h"
#include "../common/plain.h"
#include "math.h"

namespace fastcl {

// The weight as [before, units, after] around the one dimension along which the embedding varies.
struct Units {
  int64_t before = 1, units = 1, after = 1;
  int64_t row() const { return units * after; }
  int64_t numel() const { return before * row(); }
};

// False where the embedding has neither the weight's shape nor one value for each unit.
inline bool find_units(const PlainTensor& weight, const PlainTensor& embedding, Units* u) {
  int64_t dim = -1;
  if (embedding.dim != weight.dim) return false;
  for (int64_t d = 0; d < weight.dim; ++d)
    if (embedding.sizes[d] != 1) {
      if (dim >= 0 || embedding.sizes[d] != weight.sizes[d]) return false;
      dim = d;
    }
  *u = {};
  if (dim < 0) dim = 0;
  if (weight.dim == 0) return true;
  for (int64_t d = 0; d < weight.dim; ++d) (d < dim ? u->before : d == dim ? u->units : u->after) *= weight.sizes[d];
  if (embedding.numel == 1 && u->units != 1) *u = {1, 1, weight.numel};
  return true;
}

template <class T, Compensation kind>
struct Gates {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(A* FASTCL_RESTRICT mask, A* FASTCL_RESTRICT slope, const T* FASTCL_RESTRICT e, double scale,
                            double s_max, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      const A x = load(e + i);
      mask[i] = annealed_mask(x, static_cast<A>(scale));
      slope[i] = mask_slope<kind>(x, static_cast<A>(scale), static_cast<A>(s_max));
    }
  }
};

template <class T>
struct UnitMasks {
  using A = arithmetic_t<T>;
  std::vector<A> mask, slope;

  template <Compensation kind>
  static UnitMasks of(const T* e, double scale, double s_max, int64_t units) {
    UnitMasks all{std::vector<A>(units), std::vector<A>(units)};
    par_pieces(units, 4096, [&](int64_t first, int64_t last) {
      simd<Gates<T, kind>>(all.mask.data() + first, all.slope.data() + first, e + first, scale, s_max, last - first);
    });
    return all;
  }
};

// ---- units of many neighbouring weights: each at once ----

template <class T>
struct Scale {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT out, const T* FASTCL_RESTRICT w, A factor, int64_t n) {
    for (int64_t i = 0; i < n; ++i) store(out + i, load(w + i) * factor);
  }
};

// gw = g f; returns the sum of g w.
template <class T>
struct ScaleBackward {
  using A = arithmetic_t<T>;
  static FASTCL_HD double run(T* FASTCL_RESTRICT gw, const T* FASTCL_RESTRICT g, const T* FASTCL_RESTRICT w, A factor,
                              int64_t n) {
    double lane[kLanes] = {};
    const auto one = [&](int64_t i, int l) FASTCL_LAMBDA_HD {
      const A grad = load(g + i);
      lane[l] += grad * load(w + i);
      store(gw + i, grad * factor);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) one(i + l, l);
    for (; i < n; ++i) one(i, static_cast<int>(i % kLanes));
    return sum_lanes(lane);
  }
};

// f(first, last) over units, in pieces of about one chunk of weights.
template <class F>
void for_units(const Units& u, const F& f) {
  const int64_t each = std::max<int64_t>(1, u.before * u.after);
  const int64_t grain = std::max<int64_t>(1, VirtualArray::kChunk / each);
  par_pieces(u.units, u.numel() <= 2 * VirtualArray::kChunk ? u.units : grain, f);
}

// ---- units of few neighbouring weights (a column, a kernel of a transposed convolution): strips of whole units, and a
// few of their rows at a time; unit by unit, columns took twelve times as long as torch ----

constexpr int64_t kShort = 64;    // below so many weights
constexpr int64_t kStrip = 2048;  // weights of a row

template <class T>
struct ScaleRows {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT out, const T* FASTCL_RESTRICT w, const A* FASTCL_RESTRICT factor,
                            int64_t rows, int64_t stride, int64_t n) {
    for (int64_t r = 0; r < rows; ++r, out += stride, w += stride)
      for (int64_t i = 0; i < n; ++i) store(out + i, load(w + i) * factor[i]);
  }
};

// gw = g f; sums[i] += g w over the rows: eight of them in the arithmetic's type, these in double.
template <class T>
struct ScaleRowsBackward {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT gw, double* FASTCL_RESTRICT sums, const T* FASTCL_RESTRICT g,
                            const T* FASTCL_RESTRICT w, const A* FASTCL_RESTRICT factor, int64_t rows, int64_t stride,
                            int64_t n) {
    int64_t r = 0;
    for (; r + 8 <= rows; r += 8) some<8>(gw + r * stride, sums, g + r * stride, w + r * stride, factor, stride, n);
    for (; r < rows; ++r) some<1>(gw + r * stride, sums, g + r * stride, w + r * stride, factor, stride, n);
  }
  // Down kRows rows at once: a column's sum stays in its register.
  template <int kRows>
  static FASTCL_HD void some(T* FASTCL_RESTRICT gw, double* FASTCL_RESTRICT sums, const T* FASTCL_RESTRICT g,
                             const T* FASTCL_RESTRICT w, const A* FASTCL_RESTRICT factor, int64_t stride, int64_t n) {
    FASTCL_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      A sum = 0;
      const auto row = [&](int64_t r) FASTCL_LAMBDA_HD {
        const int64_t at = r * stride + i;
        const A grad = load(g + at);
        sum += grad * load(w + at);
        store(gw + at, grad * factor[i]);
      };
      row(0);
      if constexpr (kRows == 8) {  // a loop here, and gcc would leave all of it without vectors
        row(1), row(2), row(3), row(4), row(5), row(6), row(7);
      }
      sums[i] += sum;
    }
  }
};

struct Strip {
  int64_t unit, units, row, rows, group;
};

// Strips of a shape: what they are depends on nothing else.
struct Strips {
  const Units u;
  const int64_t units_each, rows_each, across, groups;

  explicit Strips(const Units& all)
      : u(all),
        units_each(std::min(all.units, kStrip / all.after)),
        // by eights, as ScaleRowsBackward goes down
        rows_each(std::max<int64_t>({8, all.before / 32, VirtualArray::kChunk / (units_each * all.after)}) / 8 * 8),
        across((all.units + units_each - 1) / units_each),
        groups((all.before + rows_each - 1) / rows_each) {}

  template <class F>
  void for_each(const F& f) const {
    const int64_t strips = across * groups;
    par_tasks(strips, u.numel() <= 2 * VirtualArray::kChunk ? strips : 1, [&](Tasks::Share& share) {
      for (int64_t s = share.take(); s >= 0; s = share.take()) {
        const int64_t unit = s % across * units_each, group = s / across, row = group * rows_each;
        f(Strip{unit, std::min(units_each, u.units - unit), row, std::min(rows_each, u.before - row), group});
      }
    });
  }
  int64_t begin(const Strip& s) const { return s.row * u.row() + s.unit * u.after; }

  // A number for each weight of a row of the strip, from one for each unit; `room` for kStrip of them.
  template <class A>
  const A* spread(A* room, const A* each, const Strip& s) const {
    if (u.after == 1) return each + s.unit;
    for (int64_t i = 0; i < s.units; ++i) std::fill_n(room + i * u.after, u.after, each[s.unit + i]);
    return room;
  }
};

// ---- the two passes ----

template <class T>
void scale_units(T* out, const T* w, const T* e, double scale, const Units& u) {
  using A = arithmetic_t<T>;
  const auto masks = UnitMasks<T>::template of<Compensation::none>(e, scale, 0.0, u.units);
  if (u.after < kShort) {
    const Strips strips(u);
    strips.for_each([&](const Strip& s) {
      alignas(64) A room[kStrip];
      const A* factor = strips.spread(room, masks.mask.data(), s);
      const int64_t at = strips.begin(s);
      simd<ScaleRows<T>>(out + at, w + at, factor, s.rows, u.row(), s.units * u.after);
    });
    return;
  }
  for_units(u, [&](int64_t first, int64_t last) {
    for (int64_t a = 0; a < u.before; ++a)
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = (a * u.units + i) * u.after;
        simd<Scale<T>>(out + at, w + at, masks.mask[i], u.after);
      }
  });
}

// gw = g m, ge = sum(g w) dm/de
template <Compensation kind, class T>
void scale_units_backward(T* gw, T* ge, const T* g, const T* w, const T* e, double scale, double s_max,
                          const Units& u) {
  using A = arithmetic_t<T>;
  const auto masks = UnitMasks<T>::template of<kind>(e, scale, s_max, u.units);
  if (u.after < kShort) {
    const Strips strips(u);
    std::vector<double> dots(strips.groups * u.units);
    strips.for_each([&](const Strip& s) {
      alignas(64) A room[kStrip];
      alignas(64) double several[kStrip];
      const A* factor = strips.spread(room, masks.mask.data(), s);
      double* dot = dots.data() + s.group * u.units + s.unit;
      double* sums = u.after == 1 ? dot : several;
      const int64_t at = strips.begin(s), n = s.units * u.after;
      std::fill_n(sums, n, 0.0);
      simd<ScaleRowsBackward<T>>(gw + at, sums, g + at, w + at, factor, s.rows, u.row(), n);
      if (sums == dot) return;
      for (int64_t i = 0; i < s.units; ++i) dot[i] = std::accumulate(sums + i * u.after, sums + (i + 1) * u.after, 0.0);
    });
    for (int64_t i = 0; i < u.units; ++i) {
      double dot = 0;
      for (int64_t group = 0; group < strips.groups; ++group) dot += dots[group * u.units + i];
      store(ge + i, static_cast<A>(dot * masks.slope[i]));
    }
    return;
  }
  for_units(u, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double dot = 0;
      for (int64_t a = 0; a < u.before; ++a) {
        const int64_t at = (a * u.units + i) * u.after;
        dot += simd<ScaleBackward<T>>(gw + at, g + at, w + at, masks.mask[i], u.after);
      }
      store(ge + i, static_cast<A>(dot * masks.slope[i]));
    }
  });
}

}  // namespace fastcl

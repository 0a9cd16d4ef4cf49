// What SI and RWalk gather along the optimizer's path, and what becomes of importances at a task's end. Memory bound,
// so each is one pass over its lists.
#include <cmath>
#include <limits>

#include "../common/direct.h"
#include "lists.h"
#include "math.h"

namespace fastcl {
namespace {

bool is_share(double value) { return std::isfinite(value) && value >= 0; }

void check_share(const char* op, const char* name, double value) {
  FASTCL_CHECK(is_share(value), op, ": ", name, " is ", value, " but must be finite and not negative");
}

void check_positive(const char* op, const char* name, double value) {
  FASTCL_CHECK(std::isfinite(value) && value > 0, op, ": ", name, " is ", value, " but must be finite and positive");
}

// ---- along the path ----

template <class T>
struct PathStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(A* FASTCL_RESTRICT w, const T* FASTCL_RESTRICT g, const T* FASTCL_RESTRICT p,
                            const T* FASTCL_RESTRICT before, int64_t n) {
    for (int64_t i = 0; i < n; ++i) w[i] += path_term(load(g + i), load(p + i) - load(before + i));
  }
};

void add_path(const Lists& lists) {  // params, omegas, grads, before
  lists.for_each([&](auto type, size_t t, int64_t begin, int64_t n, int64_t) {
    using T = decltype(type);
    simd<PathStep<T>>(lists.at<arithmetic_t<T>>(1, t, begin), lists.at<const T>(2, t, begin),
                      lists.at<const T>(0, t, begin), lists.at<const T>(3, t, begin), n);
  });
}

void accumulate_path_(const Tensors& omegas, const Tensors& grads, const Tensors& params, const Tensors& before) {
  Lists lists("accumulate_path_", {{"params", &params, Kind::value, false},
                                   {"omegas", &omegas, Kind::sum, true},
                                   {"grads", &grads, Kind::value, false},
                                   {"before", &before, Kind::value, false}});
  add_path(lists);
  lists.finish();
}

bool is_alpha(double alpha) { return alpha > 0 && alpha <= 1; }

template <class T>
struct WalkStep {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(A* FASTCL_RESTRICT f, A* FASTCL_RESTRICT gain, A* FASTCL_RESTRICT moved,
                            const T* FASTCL_RESTRICT g, const T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT before,
                            double alpha, int64_t n) {
    const A a = static_cast<A>(alpha);
    for (int64_t i = 0; i < n; ++i) {
      const A grad = load(g + i), step = load(p + i) - load(before + i);
      f[i] = moving_square(f[i], grad, a);
      gain[i] += path_term(grad, step);
      moved[i] += step;
    }
  }
};

void add_walk(const Lists& lists, double alpha) {  // params, fishers, gains, moved, grads, before
  lists.for_each([&](auto type, size_t t, int64_t begin, int64_t n, int64_t) {
    using T = decltype(type);
    using A = arithmetic_t<T>;
    simd<WalkStep<T>>(lists.at<A>(1, t, begin), lists.at<A>(2, t, begin), lists.at<A>(3, t, begin),
                      lists.at<const T>(4, t, begin), lists.at<const T>(0, t, begin), lists.at<const T>(5, t, begin),
                      alpha, n);
  });
}

void accumulate_walk_(const Tensors& fishers, const Tensors& gains, const Tensors& moved, const Tensors& grads,
                      const Tensors& params, const Tensors& before, double alpha) {
  const char* op = "accumulate_walk_";
  FASTCL_CHECK(is_alpha(alpha), op, ": alpha is ", alpha, " but must lie in (0, 1]");
  Lists lists(op, {{"params", &params, Kind::value, false},
                   {"fishers", &fishers, Kind::sum, true},
                   {"gains", &gains, Kind::sum, true},
                   {"moved", &moved, Kind::sum, true},
                   {"grads", &grads, Kind::value, false},
                   {"before", &before, Kind::value, false}});
  add_walk(lists, alpha);
  lists.finish();
}

template <class A>
struct WalkScore {
  static FASTCL_HD void run(A* FASTCL_RESTRICT score, A* FASTCL_RESTRICT gain, A* FASTCL_RESTRICT moved,
                            const A* FASTCL_RESTRICT f, double epsilon, int64_t n) {
    const A e = static_cast<A>(epsilon);
    for (int64_t i = 0; i < n; ++i) {
      score[i] += walk_score(gain[i], f[i], moved[i], e);
      gain[i] = moved[i] = A(0);
    }
  }
};

void score_walk_(const Tensors& scores, const Tensors& gains, const Tensors& moved, const Tensors& fishers,
                 double epsilon) {
  const char* op = "score_walk_";
  check_positive(op, "epsilon", epsilon);
  Lists lists(op, {{"scores", &scores, Kind::sum, true},
                   {"gains", &gains, Kind::sum, true},
                   {"moved", &moved, Kind::sum, true},
                   {"fishers", &fishers, Kind::sum, false}});
  lists.for_each([&](auto type, size_t t, int64_t begin, int64_t n, int64_t) {
    using A = arithmetic_t<decltype(type)>;
    simd<WalkScore<A>>(lists.at<A>(0, t, begin), lists.at<A>(1, t, begin), lists.at<A>(2, t, begin),
                       lists.at<const A>(3, t, begin), epsilon, n);
  });
  lists.finish();
}

// ---- at a task's end ----

template <class T, class S>
struct ConsolidatePath {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(S* FASTCL_RESTRICT f, A* FASTCL_RESTRICT w, T* FASTCL_RESTRICT start,
                            const T* FASTCL_RESTRICT p, double xi, int64_t n) {
    const A x = static_cast<A>(xi);
    for (int64_t i = 0; i < n; ++i) {
      const A more = path_importance(w[i], load(p + i) - load(start + i), x);
      store(f + i, static_cast<arithmetic_t<S>>(static_cast<A>(load(f + i)) + more));
      w[i] = A(0);
      start[i] = p[i];
    }
  }
};

template <class T, class S>
struct ConsolidatesPath {  // whether that would leave every importance finite
  using A = arithmetic_t<T>;
  static FASTCL_HD bool run(const S* f, const A* w, const T* start, const T* p, double xi, int64_t n) {
    const A x = static_cast<A>(xi);
    int32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
      const A moved = load(p + i) - load(start + i);
      const A sum = static_cast<A>(load(f + i)) + path_importance(w[i], moved, x);
      bad += !(abs(sum) <= std::numeric_limits<A>::max()) + !(abs(moved) <= std::numeric_limits<A>::max());
    }
    return bad == 0;
  }
};

void consolidate_path_(const Tensors& importances, const Tensors& omegas, const Tensors& starts, const Tensors& params,
                       double xi) {
  const char* op = "consolidate_path_";
  check_positive(op, "xi", xi);
  Lists lists(op, {{"params", &params, Kind::value, false},
                   {"importances", &importances, Kind::stored, true},
                   {"omegas", &omegas, Kind::sum, true},
                   {"starts", &starts, Kind::value, true}});
  lists.require(1, "omegas", " would give NaN or infinite importances, or its params are not finite",
                [&](auto type, auto stored, size_t t, int64_t begin, int64_t n) {
                  using T = decltype(type);
                  using S = decltype(stored);
                  return simd<ConsolidatesPath<T, S>>(
                      lists.at<const S>(1, t, begin), lists.at<const arithmetic_t<T>>(2, t, begin),
                      lists.at<const T>(3, t, begin), lists.at<const T>(0, t, begin), xi, n);
                });
  lists.for_each_stored(1, [&](auto type, auto stored, size_t t, int64_t begin, int64_t n, int64_t) {
    using T = decltype(type);
    using S = decltype(stored);
    simd<ConsolidatePath<T, S>>(lists.at<S>(1, t, begin), lists.at<arithmetic_t<T>>(2, t, begin),
                                lists.at<T>(3, t, begin), lists.at<const T>(0, t, begin), xi, n);
  });
  lists.finish();
}

template <class S, class A>
struct Merge {
  static FASTCL_HD void run(S* FASTCL_RESTRICT f, const A* FASTCL_RESTRICT fresh, double old_share, double fresh_share,
                            int64_t n) {
    const A old = static_cast<A>(old_share), add = static_cast<A>(fresh_share);
    for (int64_t i = 0; i < n; ++i)
      store(f + i, static_cast<arithmetic_t<S>>(old * static_cast<A>(load(f + i)) + add * fresh[i]));
  }
};

template <class A>
struct AllFinite {
  static FASTCL_HD bool run(const A* f, int64_t n) {
    int32_t bad = 0;  // counted, not and-ed: gcc vectorises this; NaN fails both
    for (int64_t i = 0; i < n; ++i) bad += !(f[i] >= 0) + !(f[i] <= std::numeric_limits<A>::max());
    return bad == 0;
  }
};

constexpr const char* kNotFinite = " has NaN, infinite or negative values";

int64_t merge(const Lists& lists, double old_share, double fresh_share) {  // fresh, importances; what is wrong, or -1
  const int64_t bad = lists.first_invalid(1, [&](auto type, auto, size_t t, int64_t begin, int64_t n) {
    using A = arithmetic_t<decltype(type)>;
    return simd<AllFinite<A>>(lists.at<const A>(0, t, begin), n);
  });
  if (bad >= 0) return bad;
  lists.for_each_stored(1, [&](auto type, auto stored, size_t t, int64_t begin, int64_t n, int64_t) {
    using A = arithmetic_t<decltype(type)>;
    using S = decltype(stored);
    simd<Merge<S, A>>(lists.at<S>(1, t, begin), lists.at<const A>(0, t, begin), old_share, fresh_share, n);
  });
  return -1;
}

void merge_importances_(const Tensors& importances, const Tensors& fresh, double old_share, double fresh_share) {
  const char* op = "merge_importances_";
  check_share(op, "old_share", old_share);
  check_share(op, "fresh_share", fresh_share);
  Lists lists(op, {{"fresh", &fresh, Kind::sum, false}, {"importances", &importances, Kind::stored, true}});
  const int64_t bad = merge(lists, old_share, fresh_share);
  FASTCL_CHECK(bad < 0, op, ": ", item("fresh", static_cast<size_t>(bad)), kNotFinite);
  lists.finish();
}

template <class T, class S>
struct MergeAnchored {
  using A = arithmetic_t<T>;
  static FASTCL_HD double run(S* FASTCL_RESTRICT f, T* FASTCL_RESTRICT anchor, const A* FASTCL_RESTRICT fresh,
                              const T* FASTCL_RESTRICT p, int64_t n) {
    double lane[kLanes] = {};
    const auto one = [&](int64_t i, int l) FASTCL_LAMBDA_HD {
      const A old = static_cast<A>(load(f + i)), add = fresh[i];
      const A share = share_of(old, add), apart = load(p + i) - load(anchor + i);
      lane[l] += old * share * apart * apart;
      store(anchor + i, load(anchor + i) + share * apart);
      store(f + i, static_cast<arithmetic_t<S>>(old + add));
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l) one(i + l, l);
    for (; i < n; ++i) one(i, static_cast<int>(i % kLanes));
    return sum_lanes(lane);
  }
};

Tensor merge_anchored_(const Tensors& importances, const Tensors& anchors, const Tensors& fresh,
                       const Tensors& params) {
  Lists lists("merge_anchored_", {{"params", &params, Kind::value, false},
                                  {"importances", &importances, Kind::stored, true},
                                  {"anchors", &anchors, Kind::value, true},
                                  {"fresh", &fresh, Kind::sum, false}});
  lists.require(1, "fresh", kNotFinite, [&](auto type, auto, size_t t, int64_t begin, int64_t n) {
    using A = arithmetic_t<decltype(type)>;
    return simd<AllFinite<A>>(lists.at<const A>(3, t, begin), n);
  });
  std::vector<double> partial(lists.chunks(), 0.0);
  lists.for_each_stored(1, [&](auto type, auto stored, size_t t, int64_t begin, int64_t n, int64_t chunk) {
    using T = decltype(type);
    using S = decltype(stored);
    partial[chunk] +=
        simd<MergeAnchored<T, S>>(lists.at<S>(1, t, begin), lists.at<T>(2, t, begin),
                                  lists.at<const arithmetic_t<T>>(3, t, begin), lists.at<const T>(0, t, begin), n);
  });
  lists.finish();
  double total = 0;
  for (double part : partial) total += part;
  Tensor constant = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(constant.mutable_data_ptr()) = 0.5 * total;
  return constant;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("accumulate_path_", TORCH_BOX(&accumulate_path_));
  m.impl("accumulate_walk_", TORCH_BOX(&accumulate_walk_));
  m.impl("score_walk_", TORCH_BOX(&score_walk_));
  m.impl("consolidate_path_", TORCH_BOX(&consolidate_path_));
  m.impl("merge_importances_", TORCH_BOX(&merge_importances_));
  m.impl("merge_anchored_", TORCH_BOX(&merge_anchored_));
}

}  // namespace fastcl

extern "C" {
FASTCL_EXPORT int64_t direct_accumulate_path_(const int64_t* addresses, const fastcl::DirectLists* lists,
                                              int64_t same) {
  const fastcl::Direct direct(addresses, *lists, same);
  if (!direct.apart()) return 1;
  fastcl::add_path(fastcl::Lists("accumulate_path_", direct, {2, 0, 1, 3}));
  return 0;
}
FASTCL_EXPORT int64_t direct_accumulate_walk_(const int64_t* addresses, const fastcl::DirectLists* lists, int64_t same,
                                              double alpha) {
  const fastcl::Direct direct(addresses, *lists, same);
  if (!direct.apart() || !fastcl::is_alpha(alpha)) return 1;
  fastcl::add_walk(fastcl::Lists("accumulate_walk_", direct, {4, 0, 1, 2, 3, 5}), alpha);
  return 0;
}
FASTCL_EXPORT int64_t direct_merge_importances_(const int64_t* addresses, const fastcl::DirectLists* lists,
                                                int64_t same, double old_share, double fresh_share) {
  const fastcl::Direct direct(addresses, *lists, same);
  if (!direct.apart() || !fastcl::is_share(old_share) || !fastcl::is_share(fresh_share)) return 1;
  return fastcl::merge(fastcl::Lists("merge_importances_", direct, {1, 0}), old_share, fresh_share) >= 0;
}
}

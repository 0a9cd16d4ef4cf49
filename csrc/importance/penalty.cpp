// quadratic_penalty and its gradient: memory bound, so one pass over p, a, F (and g) does everything.
#include <cmath>

#include "../common/cpu.h"
#include "math.h"

namespace fastcl {
namespace {

template <class T, class F>
struct Penalty {
  static FASTCL_HD double run(const T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT a, const F* FASTCL_RESTRICT f,
                              int64_t n) {
    using A = arithmetic_t<T>;
    double lane[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
      for (int l = 0; l < kLanes; ++l)
        lane[l] += quadratic_term(load(p + i + l), load(a + i + l), static_cast<A>(load(f + i + l)));
    for (; i < n; ++i) lane[i % kLanes] += quadratic_term(load(p + i), load(a + i), static_cast<A>(load(f + i)));
    return sum_lanes(lane);
  }
};

// g += slope when `add`, g = slope otherwise; returns sum F (p - a)^2 either way.
template <class T, class F, bool add>
struct PenaltyGrad {
  static FASTCL_HD double run(T* FASTCL_RESTRICT g, const T* FASTCL_RESTRICT p, const T* FASTCL_RESTRICT a,
                              const F* FASTCL_RESTRICT f, double strength, int64_t n) {
    using A = arithmetic_t<T>;
    const A s = static_cast<A>(strength);
    double lane[kLanes] = {};
    const auto step = [&](int64_t i, int l) FASTCL_LAMBDA_HD {
      const A pi = load(p + i), ai = load(a + i), fi = static_cast<A>(load(f + i));
      lane[l] += quadratic_term(pi, ai, fi);
      const A slope = quadratic_slope(pi, ai, fi, s);
      store(g + i, add ? load(g + i) + slope : slope);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      write_ahead<kLanes>(g + i);
      for (const T* read : {p, a}) read_ahead<kLanes>(read + i);
      read_ahead<kLanes>(f + i);
      for (int l = 0; l < kLanes; ++l) step(i + l, l);
    }
    for (; i < n; ++i) step(i, static_cast<int>(i % kLanes));
    return sum_lanes(lane);
  }
};

template <class F>
struct AllValid {
  static FASTCL_HD bool run(const F* f, int64_t n) {
    int32_t bad = 0;                                             // counted, not and-ed: gcc vectorises this
    for (int64_t i = 0; i < n; ++i) bad += !(load(f + i) >= 0);  // true for NaN
    return bad == 0;
  }
};

// Importances may be stored narrower or wider than the parameters: the parameter's dtype, float32 or bfloat16.
template <class T, class Body>
auto dispatch_importance(ScalarType dtype, const char* op, Name name, Body body) {
  if (dtype == ScalarType::BFloat16) return body(BFloat16{});
  if (dtype == ScalarType::Float) return body(float{});
  FASTCL_CHECK(dtype == ScalarType::Double || dtype == ScalarType::Half, op, ": ", name,
               " must be of a floating-point dtype");
  return body(T{});
}

void check_problem(const char* op, const Tensors& params, const Tensors& anchors, const Tensors& importances,
                   double strength) {
  FASTCL_CHECK(std::isfinite(strength) && strength >= 0, op, ": strength is ", strength,
               " but must be finite and not negative");
  check_lengths(anchors.size(), params.size(), op, "anchors", "params");
  check_lengths(importances.size(), params.size(), op, "importances", "params");
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    const Name name = item("params", i);
    FASTCL_CHECK(param.is_cpu(), op, ": ", name, " must be a CPU tensor");
    dispatch_float(param.scalar_type(), op, name, [](auto) {});
    check_like(anchors[i], param, op, item("anchors", i), name);
    check_same_dtype(anchors[i], param, op, item("anchors", i), name);
    check_like(importances[i], param, op, item("importances", i), name);
    const ScalarType f_type = importances[i].scalar_type();
    FASTCL_CHECK(f_type == param.scalar_type() || f_type == ScalarType::Float || f_type == ScalarType::BFloat16, op,
                 ": ", item("importances", i), " must have the dtype of ", name, ", float32 or bfloat16");
  }
}

// Checked arguments as addresses, in the memory order of the parameters.
struct Problem {
  const char* op;
  Addresses params, anchors, importances;
  VirtualArray all;
  bool wide = false;  // some parameter is float64

  Problem(const char* op_, const Tensors& p, const Tensors& a, const Tensors& f, bool check)
      : op(op_),
        params(Addresses::outputs(p)),
        anchors(Addresses::inputs(a, params)),
        importances(Addresses::inputs(f, params)) {
    for (size_t i = 0; i < p.size(); ++i) {
      wide |= params.dtype(i) == ScalarType::Double;
      all.add(p[i].numel());
    }
    if (check) check_importances();
  }

  void check_importances() const {
    std::vector<int64_t> bad(all.chunks(), -1);
    all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
      dispatch_float(importances.dtype(t), op, "importances", [&](auto type) {
        using F = decltype(type);
        if (!simd<AllValid<F>>(importances.at<const F>(t, begin), end - begin)) bad[chunk] = static_cast<int64_t>(t);
      });
    });
    for (int64_t t : bad)
      FASTCL_CHECK(t < 0, op, ": ", item("importances", static_cast<size_t>(t)), " has NaN or negative values");
  }

  // f(T{}, F{}, tensor, begin, end) -> that piece's sum; pieces are added chunk by chunk in double.
  template <class Piece>
  double sum(const Piece& piece) const {
    std::vector<double> partial(all.chunks(), 0.0);
    all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
      dispatch_float(params.dtype(t), op, "params", [&](auto type) {
        using T = decltype(type);
        dispatch_importance<T>(importances.dtype(t), op, "importances",
                               [&](auto f_type) { partial[chunk] += piece(type, f_type, t, begin, end); });
      });
    });
    double total = 0;
    for (double part : partial) total += part;
    return total;
  }

  Tensor value(double sum_of_terms, double strength) const {
    Tensor result = torch::stable::empty({}, wide ? ScalarType::Double : ScalarType::Float);
    const double value = 0.5 * strength * sum_of_terms;
    if (wide)
      *static_cast<double*>(result.mutable_data_ptr()) = value;
    else
      *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
    return result;
  }

  template <bool add>
  double gradient(const Addresses& grads, double strength) const {
    return sum([&](auto type, auto f_type, size_t t, int64_t begin, int64_t end) {
      using T = decltype(type);
      using F = decltype(f_type);
      return simd<PenaltyGrad<T, F, add>>(grads.at<T>(t, begin), params.at<const T>(t, begin),
                                          anchors.at<const T>(t, begin), importances.at<const F>(t, begin), strength,
                                          end - begin);
    });
  }
};

Tensor quadratic_penalty(const Tensors& params, const Tensors& anchors, const Tensors& importances, double strength,
                         bool check) {
  const char* op = "quadratic_penalty";
  check_problem(op, params, anchors, importances, strength);
  const Problem problem(op, params, anchors, importances, check);
  const double total = problem.sum([&](auto type, auto f_type, size_t t, int64_t begin, int64_t end) {
    using T = decltype(type);
    using F = decltype(f_type);
    return simd<Penalty<T, F>>(problem.params.at<const T>(t, begin), problem.anchors.at<const T>(t, begin),
                               problem.importances.at<const F>(t, begin), end - begin);
  });
  return problem.value(total, strength);
}

Tensors quadratic_penalty_backward(const Tensor& grad_value, const Tensors& params, const Tensors& anchors,
                                   const Tensors& importances, double strength) {
  const char* op = "quadratic_penalty_backward";
  check_problem(op, params, anchors, importances, strength);
  FASTCL_CHECK(grad_value.is_cpu() && grad_value.numel() == 1, op, ": grad_value must be one number on the CPU");
  const Problem problem(op, params, anchors, importances, false);
  const double upstream = dispatch_float(grad_value.scalar_type(), op, "grad_value", [&](auto type) {
    using T = decltype(type);
    return static_cast<double>(load(static_cast<const T*>(grad_value.const_data_ptr())));
  });
  Tensors grads;
  for (size_t i = 0; i < params.size(); ++i) grads.push_back(fresh_like(params[i]));
  problem.gradient<false>(Addresses::inputs(grads, problem.params), strength * upstream);
  return grads;
}

Tensor quadratic_penalty_grad_(const Tensors& grads, const Tensors& params, const Tensors& anchors,
                               const Tensors& importances, double strength, bool check) {
  const char* op = "quadratic_penalty_grad_";
  check_lengths(grads.size(), params.size(), op, "grads", "params");
  for (size_t i = 0; i < grads.size(); ++i) {
    check_output(grads[i], op, item("grads", i));
    check_like(grads[i], params[i], op, item("grads", i), item("params", i));
    check_same_dtype(grads[i], params[i], op, item("grads", i), item("params", i));
  }
  check_problem(op, params, anchors, importances, strength);
  check_distinct(grads, {&params, &anchors, &importances}, op, "grads", {"params", "anchors", "importances"});
  const Problem problem(op, params, anchors, importances, check);
  const Addresses work = Addresses::inputs(grads, problem.params);
  const double total = problem.gradient<true>(work, strength);
  for (size_t i = 0; i < grads.size(); ++i) {
    if (static_cast<const void*>(work.at<char>(i, 0)) == grads[i].const_data_ptr()) continue;  // worked on in place
    Tensor grad = grads[i];
    torch::stable::copy_(grad, work.tensor(i));
  }
  return problem.value(total, strength);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("quadratic_penalty", TORCH_BOX(&quadratic_penalty));
  m.impl("quadratic_penalty_backward", TORCH_BOX(&quadratic_penalty_backward));
  m.impl("quadratic_penalty_grad_", TORCH_BOX(&quadratic_penalty_grad_));
}

}  // namespace fastcl

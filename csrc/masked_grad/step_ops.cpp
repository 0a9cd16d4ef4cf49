// The steps as ops over lists of tensors: everything is checked, then steps.cpp does the work.
#include <cmath>
#include <deque>

#include "../common/masks.h"
#include "steps.h"

namespace fastcl {
namespace {

void check_number(const char* op, const char* name, double value, bool below_one = false) {
  FASTCL_CHECK(std::isfinite(value) && value >= 0 && (!below_one || value < 1), op, ": ", name, " is ", value,
               below_one ? " but must be at least 0 and less than 1" : " but must be finite and not negative");
}

// The lists of one step, checked, as entries. Tensors with gaps, and state or gradients whose memory order is not the
// parameter's, are worked on in copies; finish() writes them back.
class Step {
 public:
  // `steps` are Adam's counts, or empty.
  Step(const char* op, const Tensors& params, const std::vector<std::pair<const char*, Tensors>>& states,
       const Tensors& steps, const Tensors& grads, const Tensors& reserved, const Tensors& columns, bool check) {
    const size_t n = params.size();
    check_lengths(grads.size(), n, op, "grads", "params");
    for (const auto& [name, list] : states)
      if (!list.empty()) check_lengths(list.size(), n, op, name, "params");
    if (!reserved.empty()) check_lengths(reserved.size(), n, op, "reserved", "params");
    if (!columns.empty()) check_lengths(columns.size(), reserved.size(), op, "columns", "reserved");
    Tensors mutated = params;
    for (size_t i = 0; i < n; ++i) {
      const Name name = item("params", i);
      check_output(params[i], op, name);
      dispatch_float(params[i].scalar_type(), op, name, [](auto) {});
      check_like(grads[i], params[i], op, item("grads", i), name);
      check_same_dtype(grads[i], params[i], op, item("grads", i), name);
      for (const auto& [state_name, list] : states) {
        if (list.empty()) continue;
        check_output(list[i], op, item(state_name, i));
        check_like(list[i], params[i], op, item(state_name, i), name);
        check_same_dtype(list[i], params[i], op, item(state_name, i), name);
        mutated.push_back(list[i]);
      }
    }
    for (size_t i = 0; i < steps.size(); ++i) {
      const ScalarType dtype = steps[i].scalar_type();
      FASTCL_CHECK(
          steps[i].is_cpu() && steps[i].numel() == 1 && (dtype == ScalarType::Float || dtype == ScalarType::Double), op,
          ": ", item("steps", i), " must be one float32 or float64 number on the CPU");
      mutated.push_back(steps[i]);
    }
    check_distinct(mutated, {&grads, &reserved, &columns}, op, "params and state", {"grads", "reserved", "columns"});
    entries_.resize(n);
    for (size_t i = 0; i < n; ++i) {
      StepEntry& e = entries_[i] = {};
      const Tensor param = work(params[i], params[i]);
      e.param = param.mutable_data_ptr();
      e.grad = keep(in_layout_of(grads[i], param)).const_data_ptr();
      for (size_t s = 0; s < states.size(); ++s)
        if (!states[s].second.empty()) e.state[s] = work(states[s].second[i], param).mutable_data_ptr();
      e.numel = param.numel();
      if (!steps.empty()) {
        e.step = steps[i].mutable_data_ptr();
        e.wide_step = steps[i].scalar_type() == ScalarType::Double;
      }
      const ScalarType dtype = param.scalar_type();
      e.dtype = dtype == ScalarType::Float      ? 0
                : dtype == ScalarType::Double   ? 1
                : dtype == ScalarType::BFloat16 ? 2
                                                : 3;
      if (reserved.empty()) continue;
      const Name name = item("reserved", i);
      const Mask& mask =
          masks_.emplace_back(reserved[i], columns.empty() ? nullptr : &columns[i], param, op, name, item("params", i));
      FASTCL_CHECK(!check || mask.in_unit_interval(), op, ": ", name, " has values outside [0, 1] or NaN");
      e.kind = static_cast<int64_t>(mask.view().kind);
      e.mask = mask.view().data;
      e.inner = mask.view().inner;
      e.row = mask.view().row;
    }
  }

  std::vector<StepEntry>& entries() { return entries_; }
  void finish() {
    for (auto& [original, copy] : written_back_) torch::stable::copy_(original, copy);
  }

 private:
  const Tensor& keep(const Tensor& t) { return kept_.emplace_back(t); }
  const Tensor& work(const Tensor& t, const Tensor& like) {
    if (is_dense(t) && same_layout(t, like)) return keep(t);
    Tensor copy = is_dense(like) ? in_layout_of(t, like) : without_gaps(t);
    written_back_.emplace_back(t, copy);
    return keep(copy);
  }

  std::vector<StepEntry> entries_;
  std::deque<Mask> masks_;
  std::deque<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> written_back_;
};

void masked_sgd_(const Tensors& params, const Tensors& momentum_buffers, const Tensors& grads, const Tensors& reserved,
                 const Tensors& columns, double lr, double momentum, double dampening, double weight_decay,
                 bool nesterov, bool maximize, bool first, bool check) {
  const char* op = "masked_sgd_";
  check_number(op, "lr", lr);
  check_number(op, "momentum", momentum);
  check_number(op, "weight_decay", weight_decay);
  FASTCL_CHECK(std::isfinite(dampening), op, ": dampening is ", dampening, " but must be finite");
  FASTCL_CHECK(!nesterov || (momentum > 0 && dampening == 0), op,
               ": nesterov is true but needs a momentum and no dampening");
  FASTCL_CHECK(momentum_buffers.empty() ? momentum == 0 : momentum != 0, op,
               ": momentum_buffers must be given with a momentum, and only then");
  Step step(op, params, {{"momentum_buffers", momentum_buffers}}, {}, grads, reserved, columns, check);
  for (auto& e : step.entries()) e.first = first;
  const SgdOptions options{lr, momentum, dampening, weight_decay, nesterov, maximize};
  masked_sgd_entries(step.entries().data(), static_cast<int64_t>(step.entries().size()), &options);
  step.finish();
}

void masked_adam_(const Tensors& params, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                  const Tensors& max_exp_avg_sqs, const Tensors& steps, const Tensors& grads, const Tensors& reserved,
                  const Tensors& columns, double lr, double beta1, double beta2, double eps, double weight_decay,
                  bool decoupled, bool maximize, bool check) {
  const char* op = "masked_adam_";
  check_number(op, "lr", lr);
  check_number(op, "beta1", beta1, true);
  check_number(op, "beta2", beta2, true);
  check_number(op, "eps", eps);
  check_number(op, "weight_decay", weight_decay);
  check_lengths(exp_avgs.size(), params.size(), op, "exp_avgs", "params");
  check_lengths(exp_avg_sqs.size(), params.size(), op, "exp_avg_sqs", "params");
  check_lengths(steps.size(), params.size(), op, "steps", "params");
  Step step(op, params, {{"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}, {"max_exp_avg_sqs", max_exp_avg_sqs}},
            steps, grads, reserved, columns, check);
  const AdamOptions options{lr, beta1, beta2, eps, weight_decay, decoupled, maximize};
  masked_adam_entries(step.entries().data(), static_cast<int64_t>(step.entries().size()), &options);
  step.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("masked_sgd_", TORCH_BOX(&masked_sgd_));
  m.impl("masked_adam_", TORCH_BOX(&masked_adam_));
}

}  // namespace fastcl

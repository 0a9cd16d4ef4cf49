// fastcl._C.Plan: an optimizer's step over entries that Python has gathered and checked (csrc/masked_grad/steps.h).
// From step to step it only looks whether everything is still what it was then, and where the gradients are now. In
// Python the same takes longer than the step of a small network: between the kernels, which sweep the caches, each
// of the interpreter's own lines comes from memory.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "exchange.h"
#include "masked_grad/steps.h"

namespace fastcl {
namespace {

using Kernel = void (*)(StepEntry* entries, int64_t n, const void* options);

class Plan {
 public:
  // `used`: options that decide which state there is; `numbers` and `flags`: those of the kernel's struct, in order.
  // `watched`: tensors whose versions count; `written`: those that a step writes, for `count`. `profiling` and `hooks`,
  // dicts, are the process's own. Keeps no other object alive, which the collector could not see: its owner does.
  Plan(const py::object& api, const py::object& grad, const py::object& version, const py::object& count,
       const py::object& profiling, const py::tuple& hooks, const py::tuple& used, const py::tuple& numbers,
       const py::tuple& flags, const py::list& watched, const py::list& written, uintptr_t kernel, uintptr_t entries,
       const py::list& groups, const py::dict& state)
      : borrow_(borrow_of(api)),
        grad_(grad),
        version_(version),
        count_(count),
        profiling_(profiling),
        hooks_(hooks),
        used_(used),
        numbers_(numbers),
        flags_(flags),
        kernel_(reinterpret_cast<Kernel>(kernel)),
        entries_(reinterpret_cast<StepEntry*>(entries)),
        written_(written.ptr()) {
    for (const py::handle tensor : watched) watched_.push_back(tensor.ptr());
    recording_ = true;
    if (!walk(groups, state)) throw py::value_error("a gradient is not what a plan can hold");
    recording_ = false;
  }

  // One step, or false where somebody watches: the optimizer's `hooks` or the process's, or a profiler.
  bool run_unwatched(const py::list& groups, const py::dict& state, const py::dict& before, const py::dict& after) {
    const auto any = [](py::handle hooks) { return PyDict_Size(hooks.ptr()) != 0; };
    if (any(before) || any(after) || std::any_of(hooks_.begin(), hooks_.end(), any)) return false;
    return made(PyObject_CallNoArgs(profiling_.ptr())).ptr() != Py_True && run(groups, state);
  }

  // One step, or false where something is no longer what it was: nothing has been done then.
  bool run(const py::list& groups, const py::dict& state) {
    at_ = 0;
    grads_.clear();
    try {
      if (!walk(groups, state) || at_ != words_.size()) return false;
    } catch (py::error_already_set&) {  // a sparse gradient, a group without params: the caller says what is wrong
      return false;
    }
    std::vector<std::vector<int64_t>> options;
    for (const py::handle group : groups) options.push_back(options_of(group));
    const std::vector<py::object> in_use = std::move(grads_);  // whatever becomes of `grad` meanwhile
    {
      const py::gil_scoped_release release;
      StepEntry* first = entries_;
      for (size_t g = 0; g < options.size(); ++g) {
        kernel_(first, counts_[g], options[g].data());
        for (const StepEntry* end = first + counts_[g]; first < end; ++first) first->first = 0;
      }
    }
    made(PyObject_CallOneArg(count_.ptr(), written_));
    return true;
  }

 private:
  // Everything that may not change, in a fixed order: written down first, compared afterwards.
  bool walk(const py::list& groups, const py::dict& state) {
    StepEntry* entry = entries_;
    if (!word(int64_t(groups.size()))) return false;
    for (size_t g = 0; g < groups.size(); ++g) {
      const auto group = py::reinterpret_borrow<py::dict>(groups[g]);
      const StepEntry* before = entry;
      if (!object(group)) return false;
      for (const py::handle name : used_)
        if (!word(PyObject_IsTrue(item(group, name).ptr()))) return false;
      const py::tuple params(item(group, params_));
      if (!word(int64_t(params.size()))) return false;
      for (const py::handle param : params)
        if (!object(param) || !tensor(param) || !gradient(param, &entry)) return false;
      if (recording_) counts_.push_back(entry - before);
    }
    const py::list keys = made(PyDict_Keys(state.ptr())), values = made(PyDict_Values(state.ptr()));
    if (!word(int64_t(keys.size()))) return false;
    for (size_t k = 0; k < keys.size(); ++k) {
      const py::list of_param = made(PyDict_Values(values[k].ptr()));
      if (!object(keys[k]) || !word(int64_t(of_param.size()))) return false;
      for (const py::handle slot : of_param)
        if (!object(slot) || !(slot.is_none() || tensor(slot))) return false;
    }
    for (PyObject* mask : watched_)
      if (!word(PyLong_AsLongLong(version_.of(mask).ptr()))) return false;
    return true;
  }

  bool word(int64_t value) {
    if (!recording_) return at_ < words_.size() && words_[at_++] == value;
    words_.push_back(value);
    return true;
  }
  bool object(py::handle h) { return word(reinterpret_cast<int64_t>(h.ptr())); }
  bool form(const DLTensor& t) {
    bool same = true;
    t.form([&](int64_t x) { same = word(x) && same; });
    return same;
  }
  bool tensor(py::handle h) {
    DLTensor t{};
    const bool has_address = borrow_(h.ptr(), &t) == 0;
    if (!has_address) PyErr_Clear();  // another thing that somebody keeps in the state: what it is says which
    return word(has_address) && (!has_address || (word(t.address()) && form(t)));
  }
  // Its memory may be another every time, and goes into the entry.
  bool gradient(py::handle param, StepEntry** entry) {
    const py::object grad = grad_.of(param);
    if (!word(!grad.is_none())) return false;
    if (grad.is_none()) return true;
    DLTensor t{};
    if (borrow_(grad.ptr(), &t) != 0) throw py::error_already_set();
    if (negated_.of(grad) || !object(py::type::handle_of(grad)) || !form(t)) return false;
    (*entry)++->grad = reinterpret_cast<const void*>(t.address());
    if (!recording_) grads_.push_back(grad);
    return true;
  }

  static py::object item(const py::dict& group, py::handle name) {
    return made(PyObject_GetItem(group.ptr(), name.ptr()));
  }

  std::vector<int64_t> options_of(py::handle group) const {
    std::vector<int64_t> words;
    const auto add = [&](py::handle number) {
      const double value = PyFloat_AsDouble(number.ptr());
      if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
      words.emplace_back();
      std::memcpy(&words.back(), &value, sizeof value);
    };
    const auto of_group = py::reinterpret_borrow<py::dict>(group);
    for (const py::handle name : numbers_) {
      const py::object number = item(of_group, name);
      if (!PyTuple_Check(number.ptr()) && !PyList_Check(number.ptr())) {
        add(number);
        continue;
      }
      for (const py::handle each : py::tuple(number)) add(each);  // betas
    }
    for (const py::handle name : flags_) {
      const int truth = PyObject_IsTrue(item(of_group, name).ptr());
      if (truth < 0) throw py::error_already_set();
      words.push_back(truth);
    }
    return words;
  }

  const Borrow borrow_;
  const Attribute grad_, version_;
  const py::object count_, profiling_;
  const py::tuple hooks_, used_, numbers_, flags_;  // no cycle goes through them
  const py::str params_{"params"};
  const Negation negated_;
  const Kernel kernel_;
  StepEntry* const entries_;
  PyObject* const written_;
  std::vector<PyObject*> watched_;
  std::vector<int64_t> counts_;  // entries of each group
  std::vector<int64_t> words_;
  std::vector<py::object> grads_;  // during a step
  size_t at_ = 0;
  bool recording_ = false;
};

}  // namespace

void bind_plan(py::module_& m) {
  py::class_<Plan>(m, "Plan", "An optimizer's step by addresses, as long as they hold.")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::tuple&, const py::tuple&, const py::tuple&, const py::tuple&, const py::list&,
                    const py::list&, uintptr_t, uintptr_t, const py::list&, const py::dict&>())
      .def("run", &Plan::run, "One step, or False where something is no longer what it was.")
      .def("run_unwatched", &Plan::run_unwatched, "The same, or False where hooks or a profiler would notice.");
}

}  // namespace fastcl

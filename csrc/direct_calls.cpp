// fastcl._C.DirectCalls: in-place list ops straight in the library (csrc/common/direct.h), where fastcl/ops/_direct.py
// says that they may be. In C for the reason that plan.cpp gives.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "common/direct_lists.h"
#include "exchange.h"

namespace fastcl {
namespace {

constexpr size_t kKnown = 4;  // forms an op remembers: a model's, and a few others' in turn

enum class Done { no, yes, unknown };  // unknown: nothing speaks against it but that the form is new; None in Python

using Words = std::vector<int64_t>;
using Entry = int64_t (*)(const int64_t* addresses, const DirectLists* lists, int64_t same);
using EntryOf1 = int64_t (*)(const int64_t*, const DirectLists*, int64_t, double);
using EntryOf2 = int64_t (*)(const int64_t*, const DirectLists*, int64_t, double, double);

// The lists of one call: their forms, the addresses, and the objects' own addresses behind them.
struct Call {
  Words form, which;
};

struct Known {
  Words form, last;  // of the last call: what was so then, still is
  Words numels, dtypes;
};

class DirectCalls {
 public:
  // `watchers`: functions of which one is true while somebody must see the op itself.
  DirectCalls(const py::object& api, const py::tuple& types, const py::object& requires_grad, const py::object& is_leaf,
              const py::object& grad_enabled, const py::tuple& watchers, const py::object& written, uintptr_t entry,
              size_t lists, size_t mutated, size_t numbers)
      : borrow_(borrow_of(api)),
        types_(types),
        requires_grad_(requires_grad),
        is_leaf_(is_leaf),
        grad_enabled_(grad_enabled),
        written_(written),
        entry_(entry),
        lists_(lists),
        mutated_(mutated),
        numbers_(numbers) {
    for (const py::handle watcher : watchers) watchers_.push_back(py::reinterpret_borrow<py::object>(watcher));
    if (lists == 0 || numbers > 2) throw py::value_error("an entry has lists and at most two numbers");
  }

  Done call(const py::tuple& args) {
    if (std::any_of(watchers_.begin(), watchers_.end(), says_yes)) return Done::no;
    std::vector<py::object> tensors;
    std::vector<double> numbers;
    Call now;
    if (!tensors_of(args, &tensors) || !numbers_of(args, &numbers) || !look_at(tensors, &now)) return Done::no;
    bool same = false;
    const std::shared_ptr<Known> known = find(now, &same);
    if (known == nullptr) return Done::unknown;
    if (!same && std::any_of(tensors.begin(), tensors.end(), [&](const py::object& t) { return negated_.of(t); }))
      return Done::no;
    const auto n = static_cast<int64_t>(tensors.size() / lists_);
    const DirectLists lists{n, int64_t(lists_), int64_t(mutated_), known->numels.data(), known->dtypes.data()};
    {
      const py::gil_scoped_release release;
      if (run(now.which.data(), lists, same, numbers) != 0) return Done::no;
      const std::lock_guard<std::mutex> lock(mutex_);
      known->last = std::move(now.which);
    }
    for (size_t k = 0; k < mutated_; ++k) made(PyObject_CallOneArg(written_.ptr(), args[k].ptr()));
    return Done::yes;
  }

  // Remembers the form of lists that have passed the op's checks.
  void learn(const py::tuple& args, const py::list& numels, const py::list& dtypes) {
    std::vector<py::object> tensors;
    Call now;
    if (!tensors_of(args, &tensors) || !look_at(tensors, &now)) return;
    if (numels.size() != tensors.size() || dtypes.size() != tensors.size())
      throw py::value_error("numels and dtypes must be those of the tensors");
    auto known = std::make_shared<Known>();
    known->form = std::move(now.form);
    for (const py::handle numel : numels) known->numels.push_back(numel.cast<int64_t>());
    for (const py::handle dtype : dtypes) known->dtypes.push_back(dtype.cast<int64_t>());
    const std::lock_guard<std::mutex> lock(mutex_);
    known_.insert(known_.begin(), std::move(known));
    if (known_.size() > kKnown) known_.pop_back();
  }

  size_t known() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return known_.size();
  }

  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    known_.clear();
  }

 private:
  // False where there is none, or an argument is no list as long as the first.
  bool tensors_of(const py::tuple& args, std::vector<py::object>* tensors) const {
    if (args.size() < lists_) return false;
    size_t n = 0;
    for (size_t k = 0; k < lists_; ++k) {
      PyObject* list = args[k].ptr();
      if (!PyList_Check(list) && !PyTuple_Check(list)) return false;
      const auto size = static_cast<size_t>(PySequence_Size(list));
      if (k == 0) tensors->reserve(lists_ * (n = size));
      if (size != n) return false;
      for (size_t i = 0; i < n; ++i) {
        tensors->push_back(made(PySequence_GetItem(list, static_cast<Py_ssize_t>(i))));
      }
    }
    return n > 0;
  }

  bool numbers_of(const py::tuple& args, std::vector<double>* numbers) const {
    for (size_t k = lists_; k < args.size(); ++k) {
      numbers->emplace_back();
      if (!read_number(args[k].ptr(), &numbers->back())) return false;
    }
    return numbers->size() == numbers_;
  }

  // False where one is not plain, or tracked: one that would be written, or is read and has a graph.
  bool look_at(const std::vector<py::object>& tensors, Call* now) const {
    const bool tracking = says_yes(grad_enabled_);
    const size_t n = tensors.size(), written = n / lists_ * mutated_;
    now->which.resize(2 * n);
    now->form.reserve(8 * n);
    for (size_t i = 0; i < n; ++i) {
      if (!is_exactly_one_of(types_, tensors[i])) return false;
      if (tracking && requires_grad_.of(tensors[i]).ptr() == Py_True &&
          (i < written || is_leaf_.of(tensors[i]).ptr() != Py_True))
        return false;
      DLTensor t{};
      if (borrow_(tensors[i].ptr(), &t) != 0) {
        PyErr_Clear();  // sparse
        return false;
      }
      now->which[i] = t.address();
      now->which[n + i] = reinterpret_cast<int64_t>(tensors[i].ptr());
      t.form([&](int64_t word) { now->form.push_back(word); });
    }
    return true;
  }

  std::shared_ptr<Known> find(const Call& now, bool* same) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& known : known_)
      if (known->form == now.form) {
        *same = known->last == now.which;
        return known;
      }
    return nullptr;
  }

  int64_t run(const int64_t* addresses, const DirectLists& lists, bool same, const std::vector<double>& x) const {
    switch (x.size()) {
      case 0:
        return reinterpret_cast<Entry>(entry_)(addresses, &lists, same);
      case 1:
        return reinterpret_cast<EntryOf1>(entry_)(addresses, &lists, same, x[0]);
      default:
        return reinterpret_cast<EntryOf2>(entry_)(addresses, &lists, same, x[0], x[1]);
    }
  }

  const Borrow borrow_;
  const py::tuple types_;
  const Attribute requires_grad_, is_leaf_;
  const py::object grad_enabled_;
  std::vector<py::object> watchers_;
  const py::object written_;
  const Negation negated_;
  const uintptr_t entry_;
  const size_t lists_, mutated_, numbers_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Known>> known_;
};

}  // namespace

void bind_direct_calls(py::module_& m) {
  const auto call = [](DirectCalls& calls, const py::tuple& args) -> py::object {
    const Done done = calls.call(args);
    return done == Done::unknown ? py::object(py::none()) : py::object(py::bool_(done == Done::yes));
  };
  py::class_<DirectCalls>(m, "DirectCalls", "An in-place op on lists of tensors, straight in the library.")
      .def(py::init<const py::object&, const py::tuple&, const py::object&, const py::object&, const py::object&,
                    const py::tuple&, const py::object&, uintptr_t, size_t, size_t, size_t>())
      .def("call", call, "Whether it is done; None where only the form's being new speaks against it.")
      .def("learn", &DirectCalls::learn, "Remembers the form of lists that have passed the op's own checks.")
      .def("known", &DirectCalls::known, "How many forms it remembers.")
      .def("forget", &DirectCalls::forget, "Forgets them.");
}

}  // namespace fastcl

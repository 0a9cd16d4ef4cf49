// fastcl._C.DirectFunction: an op that gives new tensors, straight in the library. From Python the dispatcher takes
// twice as long as a small tensor's work, and autograd calls two ops for a mask.
#include <algorithm>
#include <string>
#include <vector>

#include "common/plain.h"
#include "exchange.h"

namespace fastcl {
namespace {

using Entry = int64_t (*)(const PlainTensor* inputs, const PlainTensor* outputs, const double* numbers);

constexpr int64_t kLargest = int64_t(4) << 20;  // bytes; from here on the op's own memory serves (common/memory.cpp)

class DirectFunction {
 public:
  // `kinds`: of the op's arguments, t (a tensor), ? (a tensor or None), n (a number). `like`: for each result the
  // tensor whose shape and dtype it has, or -1 for those of `number`.
  DirectFunction(const py::object& api, const py::tuple& types, const py::object& requires_grad,
                 const py::object& grad_enabled, const py::tuple& watchers, const py::object& empty_like,
                 const py::object& number, uintptr_t entry, std::string kinds, const py::tuple& like)
      : borrow_(borrow_of(api)),
        types_(types),
        requires_grad_(requires_grad),
        grad_enabled_(grad_enabled),
        watchers_(watchers),
        empty_like_(empty_like),
        number_(number),
        entry_(reinterpret_cast<Entry>(entry)),
        kinds_(std::move(kinds)) {
    for (const py::handle k : like) like_.push_back(k.cast<int>());
  }

  // The results; NotImplemented where tensors are plain and autograd tracks one; None where the op itself must be
  // called: they are not, somebody watches, or something is wrong and the op says what.
  py::object call(const py::tuple& args) const {
    if (args.size() != kinds_.size()) return py::none();
    if (std::any_of(watchers_.begin(), watchers_.end(), says_yes)) return py::none();
    std::vector<PlainTensor> inputs, outputs;
    std::vector<py::handle> tensors;
    std::vector<double> numbers;
    const bool tracking = says_yes(grad_enabled_);
    bool tracked = false;
    for (size_t i = 0; i < kinds_.size(); ++i) {
      PyObject* arg = args[i].ptr();
      if (kinds_[i] == 'n') {
        numbers.emplace_back();
        if (!read_number(arg, &numbers.back())) return py::none();
        continue;
      }
      PlainTensor t{};
      if (arg == Py_None ? kinds_[i] == 't' : !look_at(arg, &t)) return py::none();
      tracked = tracked || (tracking && arg != Py_None && requires_grad_.of(arg).ptr() == Py_True);
      tensors.emplace_back(arg);
      inputs.push_back(t);
    }
    if (tracked) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
    std::vector<py::object> results;
    for (const int k : like_) {
      const py::handle like = k < 0 ? py::handle(number_) : tensors[static_cast<size_t>(k)];
      results.push_back(made(PyObject_CallOneArg(empty_like_.ptr(), like.ptr())));
      PlainTensor t{};
      if (!look_at(results.back(), &t)) return py::none();
      outputs.push_back(t);
    }
    int64_t refused = 0;
    {
      const py::gil_scoped_release release;
      refused = entry_(inputs.data(), outputs.data(), numbers.data());
    }
    if (refused != 0) return py::none();
    if (results.size() == 1) return results[0];
    py::tuple all(results.size());
    for (size_t k = 0; k < results.size(); ++k) all[k] = results[k];
    return all;
  }

 private:
  bool look_at(py::handle tensor, PlainTensor* t) const {
    if (!is_exactly_one_of(types_, tensor)) return false;
    DLTensor from{};
    if (borrow_(tensor.ptr(), &from) != 0) {
      PyErr_Clear();  // sparse
      return false;
    }
    if (from.device_type != DLTensor::kCpu || !from.is_contiguous()) return false;
    if (negated_.of(tensor)) return false;
    *t = {reinterpret_cast<void*>(from.address()), from.shape, from.ndim, from.numel(), from.dtype()};
    return t->data != nullptr && t->dtype >= 0 && t->numel * (from.type_bits / 8) < kLargest;
  }

  const Borrow borrow_;
  const py::tuple types_;
  const Attribute requires_grad_;
  const py::object grad_enabled_;
  const py::tuple watchers_;
  const py::object empty_like_, number_;
  const Negation negated_;
  const Entry entry_;
  const std::string kinds_;
  std::vector<int> like_;
};

}  // namespace

void bind_direct_functions(py::module_& m) {
  py::class_<DirectFunction>(m, "DirectFunction",
                             "An op on plain tensors that gives new ones, straight in the library.")
      .def(py::init<const py::object&, const py::tuple&, const py::object&, const py::object&, const py::tuple&,
                    const py::object&, const py::object&, uintptr_t, std::string, const py::tuple&>())
      .def("call", &DirectFunction::call,
           "The results; NotImplemented where autograd tracks a tensor; None where the op itself must be called.");
}

}  // namespace fastcl

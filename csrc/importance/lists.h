// The lists of one call about importances: checked, in one memory order, and gone through in pieces.
#pragma once
#include "../common/direct.h"

namespace fastcl {

// A list's dtype: the parameters' own; the one their arithmetic is in (float32, or float64 for float64); or the one
// importances are stored in (the parameters', float32 or bfloat16).
enum class Kind { value, sum, stored };

struct List {
  const char* name;
  const Tensors* tensors;
  Kind kind;
  bool written;
};

// The lists of one call, checked, in the memory order of the first.
class Lists {
 public:
  Lists(const char* op, std::vector<List> lists) : op_(op), lists_(std::move(lists)) {
    const List& first = lists_[0];
    Tensors written;
    std::vector<const Tensors*> read;
    std::vector<const char*> read_names;
    for (const List& list : lists_) {
      check_lengths(list.tensors->size(), first.tensors->size(), op, list.name, first.name);
      for (size_t i = 0; i < list.tensors->size(); ++i) check_tensor(list, i);
      if (list.written) {
        written.insert(written.end(), list.tensors->begin(), list.tensors->end());
      } else {
        read.push_back(list.tensors);
        read_names.push_back(list.name);
      }
    }
    check_distinct(written, read, op, "written lists", read_names);
    addresses_.push_back(Addresses::outputs(*first.tensors));
    for (size_t l = 1; l < lists_.size(); ++l)
      addresses_.push_back(Addresses::inputs(*lists_[l].tensors, addresses_[0]));
    for (const Tensor& t : *first.tensors) all_.add(t.numel());
  }

  // The lists of a direct call, by their numbers among its arguments.
  Lists(const char* op, const Direct& direct, std::initializer_list<int64_t> numbers)
      : op_(op), lists_{{"", nullptr, Kind::value, false}}, all_(direct.elements()) {
    for (const int64_t number : numbers) addresses_.push_back(direct.list(number));
  }

  template <class T>
  T* at(size_t list, size_t t, int64_t begin) const {
    return addresses_[list].at<T>(t, begin);
  }
  ScalarType dtype(size_t list, size_t t) const { return addresses_[list].dtype(t); }
  int64_t chunks() const { return all_.chunks(); }

  // f(T{}, tensor, begin, n, chunk), T being the dtype of the first list.
  template <class F>
  void for_each(const F& f) const {
    all_.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
      dispatch_float(dtype(0, t), op_, lists_[0].name, [&](auto type) { f(type, t, begin, end - begin, chunk); });
    });
  }

  // The same for lists of importances: f(T{}, S{}, ...), S being the dtype that `list` is stored in.
  template <class F>
  void for_each_stored(size_t list, const F& f) const {
    for_each([&](auto type, size_t t, int64_t begin, int64_t n, int64_t chunk) {
      const ScalarType stored = dtype(list, t);
      if (stored == ScalarType::BFloat16) return f(type, BFloat16{}, t, begin, n, chunk);
      if (stored == ScalarType::Float) return f(type, float{}, t, begin, n, chunk);
      f(type, type, t, begin, n, chunk);
    });
  }

  // The first tensor for which valid(chunk's arguments as for for_each_stored) is false somewhere, or -1.
  template <class F>
  int64_t first_invalid(size_t list, const F& valid) const {
    std::vector<int64_t> bad(chunks(), -1);
    for_each_stored(list, [&](auto type, auto stored, size_t t, int64_t begin, int64_t n, int64_t chunk) {
      if (!valid(type, stored, t, begin, n)) bad[chunk] = static_cast<int64_t>(t);
    });
    for (int64_t t : bad)
      if (t >= 0) return t;
    return -1;
  }
  // Raises, naming that tensor.
  template <class F>
  void require(size_t list, const char* name, const char* what, const F& valid) const {
    const int64_t bad = first_invalid(list, valid);
    FASTCL_CHECK(bad < 0, op_, ": ", item(name, static_cast<size_t>(bad)), what);
  }

  // Writes back what was worked on in copies.
  void finish() {
    if (lists_[0].written) addresses_[0].finish();
    for (size_t l = 1; l < lists_.size(); ++l) {
      if (!lists_[l].written) continue;
      for (size_t i = 0; i < lists_[l].tensors->size(); ++i) {
        Tensor original = (*lists_[l].tensors)[i];
        if (static_cast<const void*>(at<char>(l, i, 0)) != original.const_data_ptr())
          torch::stable::copy_(original, addresses_[l].tensor(i));
      }
    }
  }

 private:
  void check_tensor(const List& list, size_t i) const {
    const Tensor &t = (*list.tensors)[i], &first = (*lists_[0].tensors)[i];
    const Name name = item(list.name, i), first_name = item(lists_[0].name, i);
    if (list.written) check_output(t, op_, name);
    if (&list == &lists_[0]) {
      FASTCL_CHECK(t.is_cpu(), op_, ": ", name, " must be a CPU tensor");
      dispatch_float(t.scalar_type(), op_, name, [](auto) {});
      FASTCL_CHECK(
          list.kind == Kind::value || t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double,
          op_, ": ", name, " must be float32 or float64, the types that sums are kept in");
      return;
    }
    check_like(t, first, op_, name, first_name);
    const ScalarType own = t.scalar_type(), of_first = first.scalar_type();
    const ScalarType sum = of_first == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
    if (list.kind == Kind::value) check_same_dtype(t, first, op_, name, first_name);
    if (list.kind == Kind::sum)
      FASTCL_CHECK(own == sum, op_, ": ", name, " must be ", sum == ScalarType::Double ? "float64" : "float32",
                   ", the type that sums for ", first_name, " are kept in");
    if (list.kind == Kind::stored)
      FASTCL_CHECK(own == of_first || own == ScalarType::Float || own == ScalarType::BFloat16, op_, ": ", name,
                   " must have the dtype of ", first_name, ", float32 or bfloat16");
  }

  const char* op_;
  std::vector<List> lists_;
  std::vector<Addresses> addresses_;
  VirtualArray all_;
};

}  // namespace fastcl

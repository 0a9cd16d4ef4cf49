// Ops without a dispatcher.
//
// `direct_NAME` of an in-place op on lists: csrc/direct_calls.cpp calls an entry with the addresses of plain tensors
// (CPU, without gaps, all of an index in one memory order) whose forms have passed the op's own checks before. An entry
// looks at what forms do not tell, before it writes; where it finds something wrong it returns 1, and the op itself
// says what.
//
// `function_NAME` of an op that gives new tensors: csrc/direct_functions.cpp calls it with plain tensors, whatever
// their shapes and dtypes, results that it has made, and the op's numbers. It returns 1 where the op itself must look.
#pragma once
#include "cpu.h"
#include "direct_lists.h"
#include "export.h"
#include "plain.h"

namespace fastcl {

inline ScalarType dtype_of(const PlainTensor& t) { return static_cast<ScalarType>(t.dtype); }

class Direct {
 public:
  // `same`: the addresses are those of a call before, which were apart.
  Direct(const int64_t* addresses, const DirectLists& lists, int64_t same)
      : addresses_(addresses), lists_(lists), apart_(same != 0 || are_apart()) {}

  bool apart() const { return apart_; }
  size_t size() const { return static_cast<size_t>(lists_.n); }
  Addresses list(int64_t which) const {
    return Addresses(addresses_ + which * lists_.n, lists_.dtypes + which * lists_.n, size());
  }
  VirtualArray elements() const {  // of the first list
    VirtualArray all;
    for (int64_t i = 0; i < lists_.n; ++i) all.add(lists_.numels[i]);
    return all;
  }

 private:
  bool are_apart() const;

  const int64_t* addresses_;
  const DirectLists& lists_;
  bool apart_;
};

}  // namespace fastcl

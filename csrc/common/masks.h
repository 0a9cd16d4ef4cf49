// Reserved masks in every stored form, read as the free share 1 - r of each weight: 0 exactly where r is 1.
#pragma once
#include "cpu.h"

namespace fastcl {

enum class MaskKind : int64_t { none, boolean, packed, f32, f64, bf16, f16, vectors };

// `vectors` is HAT's min(outer[i], inner[j]) without the matrix: the weight's memory is rows of `row` elements; `data`
// holds one value a row, `inner` one value for each place in a row, both in the arithmetic type.
struct MaskView {
  MaskKind kind = MaskKind::none;
  const void* data = nullptr;
  const void* inner = nullptr;
  int64_t row = 0;
};

// A body works through blocks of this many weights: 4 KiB of free shares stay in L1.
constexpr int64_t kMaskBlock = 1024;

template <class A, class M>
FASTCL_HD void free_from_floats(A* FASTCL_RESTRICT free, const M* FASTCL_RESTRICT r, int64_t n) {
  for (int64_t i = 0; i < n; ++i) free[i] = A(1) - static_cast<A>(load(r + i));
}

// to[i] = value(word, j), where bit j of word is bit i % 8 of byte i / 8; 32 weights from one word: the shifts
// vectorise.
template <class Out, class F>
FASTCL_HD void expand_bits(Out* FASTCL_RESTRICT to, const uint8_t* FASTCL_RESTRICT bytes, int64_t n, const F& value) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32, bytes += 4) {
    const uint32_t word =
        uint32_t(bytes[0]) | uint32_t(bytes[1]) << 8 | uint32_t(bytes[2]) << 16 | uint32_t(bytes[3]) << 24;
    for (uint32_t j = 0; j < 32; ++j) to[i + j] = value(word, j);
  }
  for (uint32_t j = 0; i + j < n; ++j) to[i + j] = value(bytes[j >> 3], j & 7);
}

template <class A>
FASTCL_HD void free_from_vectors(A* FASTCL_RESTRICT free, const MaskView& mask, int64_t begin, int64_t n) {
  const A* outer = static_cast<const A*>(mask.data) + begin / mask.row;
  int64_t column = begin % mask.row;
  for (int64_t i = 0; i < n; ++outer, column = 0) {
    const A* inner = static_cast<const A*>(mask.inner) + column;
    const int64_t run = std::min(n - i, mask.row - column);
    const A o = *outer;
    for (int64_t k = 0; k < run; ++k) free[i + k] = A(1) - (inner[k] < o ? inner[k] : o);
    i += run;
  }
}

// free[0..n) of the weights begin..begin+n; begin is a multiple of 8 (VirtualArray aligns pieces to 64).
template <class A>
FASTCL_HD void free_shares(A* FASTCL_RESTRICT free, const MaskView& mask, int64_t begin, int64_t n) {
  switch (mask.kind) {
    case MaskKind::none:
      for (int64_t i = 0; i < n; ++i) free[i] = A(1);
      return;
    case MaskKind::boolean: {
      const uint8_t* r = static_cast<const uint8_t*>(mask.data) + begin;
      for (int64_t i = 0; i < n; ++i) free[i] = static_cast<A>(static_cast<int32_t>(r[i] == 0));
      return;
    }
    case MaskKind::packed:
      return expand_bits(free, static_cast<const uint8_t*>(mask.data) + begin / 8, n,
                         [](uint32_t word, uint32_t j)
                             FASTCL_LAMBDA_HD { return static_cast<A>(static_cast<int32_t>(1 - (word >> j & 1))); });
    case MaskKind::f32:
      return free_from_floats(free, static_cast<const float*>(mask.data) + begin, n);
    case MaskKind::f64:
      return free_from_floats(free, static_cast<const double*>(mask.data) + begin, n);
    case MaskKind::bf16:
      return free_from_floats(free, static_cast<const BFloat16*>(mask.data) + begin, n);
    case MaskKind::f16:
      return free_from_floats(free, static_cast<const Half*>(mask.data) + begin, n);
    case MaskKind::vectors:
      return free_from_vectors(free, mask, begin, n);
  }
}

// g (1 - r): 0 where reserved, also where g is Inf or NaN.
template <class A>
FASTCL_HD A free_part(A g, A free) {
  return free == A(0) ? A(0) : g * free;
}

// g = g (1 - r) on the weights begin..begin+n, whose gradients start at g.
template <class T>
struct ShareGradient {
  static FASTCL_HD void run(T* FASTCL_RESTRICT g, MaskView mask, int64_t begin, int64_t n) {
    alignas(64) arithmetic_t<T> free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t m = std::min(kMaskBlock, n - at);
      free_shares(free, mask, begin + at, m);
      for (int64_t i = 0; i < m; ++i) store(g + at + i, free_part(load(g + at + i), free[i]));
    }
  }
};

// `old` where the weight is kept, bit for bit, `fresh` where it is not. The choice is on a word of the element's width,
// which gcc makes a blend of; by a byte it does not vectorise, and by and/or it is twice the work.
FASTCL_HD float choose(bool keep, float old, float fresh) {
  const int32_t word = -static_cast<int32_t>(keep);
  return word < 0 ? old : fresh;
}
FASTCL_HD double choose(bool keep, double old, double fresh) {
  const int64_t word = -static_cast<int64_t>(keep);
  return word < 0 ? old : fresh;
}
template <class H>
FASTCL_HD H choose(bool keep, H old, float fresh) {
  H rounded;
  store(&rounded, fresh);
  const uint32_t word = static_cast<uint32_t>(-static_cast<int32_t>(keep));
  old.x = static_cast<uint16_t>((uint32_t(old.x) & word) | (uint32_t(rounded.x) & ~word));
  return old;
}

// words[0..n) of the weights begin..begin+n of a bool or packed mask: negative where one is reserved.
FASTCL_HD void keep_words(int32_t* FASTCL_RESTRICT words, const MaskView& mask, int64_t begin, int64_t n) {
  if (mask.kind == MaskKind::boolean) {
    const uint8_t* FASTCL_RESTRICT r = static_cast<const uint8_t*>(mask.data) + begin;
    for (int64_t i = 0; i < n; ++i) words[i] = -static_cast<int32_t>(r[i] != 0);
    return;
  }
  expand_bits(words, static_cast<const uint8_t*>(mask.data) + begin / 8, n,
              [](uint32_t word, uint32_t j) FASTCL_LAMBDA_HD { return static_cast<int32_t>(word << (31 - j)); });
}

// What 64 weights in a row have in common. A unit's weights lie together in memory: where all are reserved (or, for a
// gradient, all free), leaving them out moves none of their bytes.
constexpr int64_t kAlike = 64;
enum class Alike { no, free, reserved };

FASTCL_HD Alike alike(const uint8_t* bools) {
  constexpr uint64_t kOnes = 0x0101010101010101;
  uint64_t words[kAlike / 8], differ = 0;
  std::memcpy(words, bools, sizeof words[0]);  // a mask without order is told from these
  if (words[0] != 0 && words[0] != kOnes) return Alike::no;
  std::memcpy(words, bools, sizeof words);
  for (const uint64_t word : words) differ |= word ^ words[0];
  return differ != 0 ? Alike::no : words[0] == 0 ? Alike::free : Alike::reserved;
}

FASTCL_HD Alike alike(const MaskView& mask, int64_t begin) {  // of a bool or packed mask; begin is a multiple of 8
  if (mask.kind == MaskKind::boolean) return alike(static_cast<const uint8_t*>(mask.data) + begin);
  uint64_t bits;
  std::memcpy(&bits, static_cast<const uint8_t*>(mask.data) + begin / 8, sizeof bits);
  return bits == 0 ? Alike::free : bits == ~uint64_t(0) ? Alike::reserved : Alike::no;
}

template <class A>
FASTCL_HD Alike alike(const A* free) {  // of kAlike shares
  int32_t differ = 0;
  for (int64_t i = 0; i < kAlike; ++i) differ += free[i] != free[0];
  return differ != 0 ? Alike::no : free[0] == A(1) ? Alike::free : free[0] == A(0) ? Alike::reserved : Alike::no;
}

// Whether all of a piece lies in [0, 1]; NaN does not.
template <class M>
struct AllInUnitInterval {
  static FASTCL_HD bool run(const M* r, int64_t n) {
    int32_t bad = 0;  // counted, not and-ed: gcc vectorises this
    for (int64_t i = 0; i < n; ++i) {
      const auto x = load(r + i);
      bad += !(x >= 0) + !(x <= 1);
    }
    return bad == 0;
  }
};

// One weight's mask as a kernel wants it: checked, in the weight's memory order, temporaries kept alive.
class Mask {
 public:
  Mask() = default;  // none
  // `reserved`: bool or floating point of the weight's shape; uint8 of one bit a weight in its memory order (`weight`
  // must then be the caller's own, before any copy, if that order is to hold); bool of shape [0] for no mask; or, where
  // `columns` is not empty, one value for each index of dimension 0, and `columns` one for each index of dimension 1.
  Mask(const Tensor& reserved, const Tensor* columns, const Tensor& weight, const char* op, Name name,
       Name weight_name);
  const MaskView& view() const { return view_; }
  bool in_unit_interval() const;  // false for NaN; reads float masks once

 private:
  void take_vectors(const Tensor& rows, const Tensor& columns, const Tensor& weight, const char* op, Name name,
                    Name weight_name);
  Tensor data_, inner_;
  int64_t numel_ = 0;
  MaskView view_;
  bool wide_ = false;
};

}  // namespace fastcl

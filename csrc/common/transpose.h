// to[c][r] = from[r][c] (- minus[c]), converted: rows of samples become the lanes of a block, and lanes rows again.
#pragma once
#include <type_traits>

#include "cpu.h"

#ifdef FASTCL_X86
#include <immintrin.h>
#endif

namespace fastcl {

template <class To, class From, bool shifted>
struct Transpose {
  using A = arithmetic_t<To>;
  static FASTCL_HD void run(To* FASTCL_RESTRICT to, int64_t to_stride, const From* FASTCL_RESTRICT from,
                            int64_t from_stride, int64_t rows, int64_t columns, const A* FASTCL_RESTRICT minus) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8)
      some<8>(to + c * to_stride, to_stride, from + c, from_stride, rows, minus + (shifted ? c : 0));
    for (; c < columns; ++c)
      some<1>(to + c * to_stride, to_stride, from + c, from_stride, rows, minus + (shifted ? c : 0));
  }
  template <int count>  // columns at a time, whose lines in the cache are then still there for the next row
  static FASTCL_HD void some(To* FASTCL_RESTRICT to, int64_t to_stride, const From* FASTCL_RESTRICT from,
                             int64_t from_stride, int64_t rows, const A* FASTCL_RESTRICT minus) {
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < count; ++c) {
        const A value = load(from + r * from_stride + c);
        store(to + c * to_stride + r, shifted ? value - minus[c] : value);
      }
  }
};

#ifdef FASTCL_X86
// Four columns of as many rows as a register has numbers: row i of every four is loaded into a 128-bit lane of its own,
// within which two unpackings transpose.
template <bool shifted>
FASTCL_AVX512 inline void transpose_sixteen(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                            const float* minus) {
  __m512 row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_castps128_ps512(_mm_loadu_ps(from + i * from_stride));
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 4) * from_stride), 1);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 8) * from_stride), 2);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 12) * from_stride), 3);
    if (shifted) row[i] = _mm512_sub_ps(row[i], _mm512_broadcast_f32x4(_mm_loadu_ps(minus)));
  }
  const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpackhi_ps(row[0], row[1]);
  const __m512 d = _mm512_unpacklo_ps(row[2], row[3]), e = _mm512_unpackhi_ps(row[2], row[3]);
  _mm512_storeu_ps(to, _mm512_shuffle_ps(a, d, 0x44));
  _mm512_storeu_ps(to + to_stride, _mm512_shuffle_ps(a, d, 0xEE));
  _mm512_storeu_ps(to + 2 * to_stride, _mm512_shuffle_ps(b, e, 0x44));
  _mm512_storeu_ps(to + 3 * to_stride, _mm512_shuffle_ps(b, e, 0xEE));
}

template <bool shifted>
FASTCL_AVX2 inline void transpose_eight(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                        const float* minus) {
  __m256 row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * from_stride)),
                                  _mm_loadu_ps(from + (i + 4) * from_stride), 1);
    if (shifted) row[i] = _mm256_sub_ps(row[i], _mm256_broadcast_ps(reinterpret_cast<const __m128*>(minus)));
  }
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
  const __m256 d = _mm256_unpacklo_ps(row[2], row[3]), e = _mm256_unpackhi_ps(row[2], row[3]);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(a, d, 0x44));
  _mm256_storeu_ps(to + to_stride, _mm256_shuffle_ps(a, d, 0xEE));
  _mm256_storeu_ps(to + 2 * to_stride, _mm256_shuffle_ps(b, e, 0x44));
  _mm256_storeu_ps(to + 3 * to_stride, _mm256_shuffle_ps(b, e, 0xEE));
}

template <bool shifted>
FASTCL_AVX2 inline void transpose_four(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                       const float* minus) {
  __m128 row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm_loadu_ps(from + i * from_stride);
    if (shifted) row[i] = _mm_sub_ps(row[i], _mm_loadu_ps(minus));
  }
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, row[i]);
}

// As many whole rows of such squares as there are, of columns a multiple of 4; returns how many rows are done.
template <bool shifted>
FASTCL_AVX512 inline int64_t transpose_avx512(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                              int64_t rows, int64_t columns, const float* minus) {
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_sixteen<shifted>(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride,
                                 minus + (shifted ? c : 0));
  return r;
}
template <bool shifted>
FASTCL_AVX2 inline int64_t transpose_avx2(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                          int64_t rows, int64_t columns, const float* minus) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_eight<shifted>(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride,
                               minus + (shifted ? c : 0));
  for (; r + 4 <= rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_four<shifted>(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride,
                              minus + (shifted ? c : 0));
  return r;
}
#endif

template <bool shifted, class To, class From>
void transpose_of(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t rows, int64_t columns,
                  const arithmetic_t<To>* minus) {
  const auto plain = [&](int64_t first_row, int64_t first, int64_t end) {
    simd<Transpose<To, From, shifted>>(to + first * to_stride + first_row, to_stride,
                                       from + first_row * from_stride + first, from_stride, rows - first_row,
                                       end - first, minus + (shifted ? first : 0));
  };
  int64_t done = 0, whole = 0;
#ifdef FASTCL_X86
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, float>) {
    whole = columns / 4 * 4;
    if (isa() == Isa::avx512) done = transpose_avx512<shifted>(to, to_stride, from, from_stride, rows, whole, minus);
    if (isa() != Isa::baseline)
      done += transpose_avx2<shifted>(to + done, to_stride, from + done * from_stride, from_stride, rows - done, whole,
                                      minus);
  }
#endif
  plain(done, 0, whole);
  plain(0, whole, columns);
}

template <class To, class From>
void transpose(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t rows, int64_t columns) {
  transpose_of<false>(to, to_stride, from, from_stride, rows, columns, nullptr);
}
template <class To, class From>
void transpose_less(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t rows, int64_t columns,
                    const arithmetic_t<To>* minus) {
  transpose_of<true>(to, to_stride, from, from_stride, rows, columns, minus);
}

}  // namespace fastcl

// to[c][r] = from[r][c], converted: rows of samples become the lanes of a block, and lanes rows again.
#pragma once
#include <type_traits>

#include "cpu.h"

#ifdef FASTCL_X86
#include <immintrin.h>
#endif

namespace fastcl {

template <class To, class From>
struct Transpose {
  static FASTCL_HD void run(To* FASTCL_RESTRICT to, int64_t to_stride, const From* FASTCL_RESTRICT from,
                            int64_t from_stride, int64_t rows, int64_t columns) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) some<8>(to + c * to_stride, to_stride, from + c, from_stride, rows);
    for (; c < columns; ++c) some<1>(to + c * to_stride, to_stride, from + c, from_stride, rows);
  }
  template <int count>  // columns at a time, whose lines in the cache are then still there for the next row
  static FASTCL_HD void some(To* FASTCL_RESTRICT to, int64_t to_stride, const From* FASTCL_RESTRICT from,
                             int64_t from_stride, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int c = 0; c < count; ++c) {
        store(to + c * to_stride + r, arithmetic_t<To>(load(from + r * from_stride + c)));
      }
  }
};

#ifdef FASTCL_X86
// Four columns of as many rows as a register has numbers: row i of every four is loaded into a 128-bit lane of its own,
// within which two unpackings transpose.
FASTCL_AVX512 inline void transpose_sixteen(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  __m512 row[4];
  for (int i = 0; i < 4; ++i) {
    row[i] = _mm512_castps128_ps512(_mm_loadu_ps(from + i * from_stride));
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 4) * from_stride), 1);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 8) * from_stride), 2);
    row[i] = _mm512_insertf32x4(row[i], _mm_loadu_ps(from + (i + 12) * from_stride), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpackhi_ps(row[0], row[1]);
  const __m512 d = _mm512_unpacklo_ps(row[2], row[3]), e = _mm512_unpackhi_ps(row[2], row[3]);
  _mm512_storeu_ps(to, _mm512_shuffle_ps(a, d, 0x44));
  _mm512_storeu_ps(to + to_stride, _mm512_shuffle_ps(a, d, 0xEE));
  _mm512_storeu_ps(to + 2 * to_stride, _mm512_shuffle_ps(b, e, 0x44));
  _mm512_storeu_ps(to + 3 * to_stride, _mm512_shuffle_ps(b, e, 0xEE));
}

FASTCL_AVX2 inline void transpose_eight(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  __m256 row[4];
  for (int i = 0; i < 4; ++i)
    row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + i * from_stride)),
                                  _mm_loadu_ps(from + (i + 4) * from_stride), 1);
  const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
  const __m256 d = _mm256_unpacklo_ps(row[2], row[3]), e = _mm256_unpackhi_ps(row[2], row[3]);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(a, d, 0x44));
  _mm256_storeu_ps(to + to_stride, _mm256_shuffle_ps(a, d, 0xEE));
  _mm256_storeu_ps(to + 2 * to_stride, _mm256_shuffle_ps(b, e, 0x44));
  _mm256_storeu_ps(to + 3 * to_stride, _mm256_shuffle_ps(b, e, 0xEE));
}

FASTCL_AVX2 inline void transpose_four(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * from_stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * to_stride, row[i]);
}

// As many whole rows of such squares as there are, of columns a multiple of 4; returns how many rows are done.
FASTCL_AVX512 inline int64_t transpose_avx512(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                              int64_t rows, int64_t columns) {
  int64_t r = 0;
  for (; r + 16 <= rows; r += 16)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_sixteen(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride);
  return r;
}
FASTCL_AVX2 inline int64_t transpose_avx2(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                          int64_t rows, int64_t columns) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_eight(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride);
  for (; r + 4 <= rows; r += 4)
    for (int64_t c = 0; c < columns; c += 4)
      transpose_four(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride);
  return r;
}
#endif

template <class To, class From>
void transpose(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t rows, int64_t columns) {
  const auto plain = [&](int64_t first_row, int64_t first, int64_t end) {
    simd<Transpose<To, From>>(to + first * to_stride + first_row, to_stride, from + first_row * from_stride + first,
                              from_stride, rows - first_row, end - first);
  };
  int64_t done = 0, whole = 0;
#ifdef FASTCL_X86
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, float>) {
    whole = columns / 4 * 4;
    if (isa() == Isa::avx512) done = transpose_avx512(to, to_stride, from, from_stride, rows, whole);
    if (isa() != Isa::baseline)
      done += transpose_avx2(to + done, to_stride, from + done * from_stride, from_stride, rows - done, whole);
  }
#endif
  plain(done, 0, whole);
  plain(0, whole, columns);
}

}  // namespace fastcl

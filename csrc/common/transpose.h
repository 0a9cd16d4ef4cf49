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
      for (int c = 0; c < count; ++c) store(to + c * to_stride + r, load(from + r * from_stride + c));
  }
};

#ifdef FASTCL_X86
// In squares of eight: rows r and r + 4 are loaded into one register's halves, within which two unpackings transpose.
FASTCL_AVX2 inline void transpose_avx2(float* to, int64_t to_stride, const float* from, int64_t from_stride,
                                       int64_t rows, int64_t columns) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t r = 0; r < whole_rows; r += 8)
    for (int64_t c = 0; c < whole_columns; c += 4) {
      const float* at = from + r * from_stride + c;
      __m256 row[4];
      for (int i = 0; i < 4; ++i)
        row[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at + i * from_stride)),
                                      _mm_loadu_ps(at + (i + 4) * from_stride), 1);
      const __m256 a = _mm256_unpacklo_ps(row[0], row[1]), b = _mm256_unpackhi_ps(row[0], row[1]);
      const __m256 d = _mm256_unpacklo_ps(row[2], row[3]), e = _mm256_unpackhi_ps(row[2], row[3]);
      float* into = to + c * to_stride + r;
      _mm256_storeu_ps(into, _mm256_shuffle_ps(a, d, 0x44));
      _mm256_storeu_ps(into + to_stride, _mm256_shuffle_ps(a, d, 0xEE));
      _mm256_storeu_ps(into + 2 * to_stride, _mm256_shuffle_ps(b, e, 0x44));
      _mm256_storeu_ps(into + 3 * to_stride, _mm256_shuffle_ps(b, e, 0xEE));
    }
  Transpose<float, float>::run(to + whole_rows, to_stride, from + whole_rows * from_stride, from_stride,
                               rows - whole_rows, whole_columns);
  Transpose<float, float>::run(to + whole_columns * to_stride, to_stride, from + whole_columns, from_stride, rows,
                               columns - whole_columns);
}
#endif

template <class To, class From>
void transpose(To* to, int64_t to_stride, const From* from, int64_t from_stride, int64_t rows, int64_t columns) {
#ifdef FASTCL_X86
  if constexpr (std::is_same_v<To, float> && std::is_same_v<From, float>)
    if (isa() != Isa::baseline) return transpose_avx2(to, to_stride, from, from_stride, rows, columns);
#endif
  simd<Transpose<To, From>>(to, to_stride, from, from_stride, rows, columns);
}

}  // namespace fastcl

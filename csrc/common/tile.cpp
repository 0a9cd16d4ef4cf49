#include "tile.h"

#include "cpu.h"

namespace fastcl {

#define FASTCL_TILE(NAME, TARGET, ...)                                                                              \
  template <class T>                                                                                                \
  struct NAME {                                                                                                     \
    using Of = __VA_ARGS__;                                                                                         \
    TARGET static void run(const T* g, const T* a, T* out, int64_t ldo, int64_t n, int64_t p, Reduce reduce) {      \
      Of::run(g, a, out, ldo, n, p, reduce);                                                                        \
    }                                                                                                               \
    TARGET static void add_rows(const T* g, int64_t ldg, const T* a, int64_t lda, T* out, int64_t ldo, int64_t p) { \
      Of::add_rows(g, ldg, a, lda, out, ldo, p);                                                                    \
    }                                                                                                               \
    TARGET static void triangle(const T* panels, int64_t rows, const T* a, T* out) {                                \
      Of::triangle(panels, rows, a, out);                                                                           \
    }                                                                                                               \
    TARGET static void triangle_squares(const T* panels, int64_t rows, const T* a, T* out) {                        \
      Of::triangle_squares(panels, rows, a, out);                                                                   \
    }                                                                                                               \
    static TileChoice<T> choice() { return {Of::MR, Of::NR, &run, &add_rows, &triangle, &triangle_squares}; }       \
  };

#ifdef FASTCL_X86
FASTCL_TILE(Avx512, FASTCL_AVX512, Tile<T, 8, 3, 64 / sizeof(T)>)  // 24 of 32 registers accumulate
FASTCL_TILE(Avx2, FASTCL_AVX2, Tile<T, 6, 2, 32 / sizeof(T)>)      // 12 of 16
#endif
FASTCL_TILE(Baseline, , Tile<T, 4, 2, 16 / sizeof(T)>)  // 8 of 16 (SSE2) or 32 (NEON)

template <class T>
TileChoice<T> choose_tile() {
#ifdef FASTCL_X86
  if (isa() == Isa::avx512) return Avx512<T>::choice();
  if (isa() == Isa::avx2) return Avx2<T>::choice();
#endif
  return Baseline<T>::choice();
}
template TileChoice<float> choose_tile<float>();
template TileChoice<double> choose_tile<double>();

}  // namespace fastcl

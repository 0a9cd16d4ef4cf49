#include "tile.h"

#include "cpu.h"

namespace fastcl {

#ifdef FASTCL_X86
template <class T>
FASTCL_AVX512 void tile_avx512(const T* g, const T* a, T* out, int64_t ldo, int64_t n, int64_t p, Reduce reduce) {
  Tile<T, 8, 3, 64 / sizeof(T)>::run(g, a, out, ldo, n, p, reduce);  // 24 of 32 registers accumulate
}
template <class T>
FASTCL_AVX2 void tile_avx2(const T* g, const T* a, T* out, int64_t ldo, int64_t n, int64_t p, Reduce reduce) {
  Tile<T, 6, 2, 32 / sizeof(T)>::run(g, a, out, ldo, n, p, reduce);  // 12 of 16
}
#endif
template <class T>
void tile_baseline(const T* g, const T* a, T* out, int64_t ldo, int64_t n, int64_t p, Reduce reduce) {
  Tile<T, 4, 2, 16 / sizeof(T)>::run(g, a, out, ldo, n, p, reduce);  // 8 of 16 (SSE2) or 32 (NEON)
}

template <class T>
TileChoice<T> choose_tile() {
#ifdef FASTCL_X86
  if (isa() == Isa::avx512) return {8, 192 / static_cast<int>(sizeof(T)), &tile_avx512<T>};
  if (isa() == Isa::avx2) return {6, 64 / static_cast<int>(sizeof(T)), &tile_avx2<T>};
#endif
  return {4, 32 / static_cast<int>(sizeof(T)), &tile_baseline<T>};
}
template TileChoice<float> choose_tile<float>();
template TileChoice<double> choose_tile<double>();

}  // namespace fastcl

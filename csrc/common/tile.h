// The register tile under every product: one MR x NR block of sum_p g[p, o] a[p, i]. Where there are several samples it
// takes |.|^power of each one's block before it sums them, without the per-sample block ever leaving the registers.
// Operands are packed in panels, or are rows as they lie; a left one that is a lower triangle is gone through at once.
#pragma once
#include "cpu.h"
#include "lanes.h"
#include "math.h"

namespace fastcl {

enum class Reduce { plain, absolute, square };  // what is done to a sample's gradient before it is summed

// g is packed [samples][positions][MR], a is packed [samples][positions][NR], out is row-major with row length ldo.
template <class T>
using TileFunction = void (*)(const T* g, const T* a, T* out, int64_t ldo, int64_t samples, int64_t positions,
                              Reduce reduce);

template <class T, int MR_, int VECTORS, int WIDTH>
struct Tile {
  static constexpr int MR = MR_, NR = VECTORS * WIDTH;
  using Vector = typename Lanes<T, WIDTH>::Vector;

  static FASTCL_HD Vector absolute(Vector v) {
    const T* x = reinterpret_cast<const T*>(&v);
    Vector result;
    T* r = reinterpret_cast<T*>(&result);
    for (int i = 0; i < WIDTH; ++i) r[i] = abs(x[i]);
    return result;
  }

  // dw = one sample's block, of which row p of g begins at g + p ldg and row p of a at a + p lda.
  static FASTCL_HD void block(Vector (&dw)[MR][VECTORS], const T* g, int64_t ldg, const T* a, int64_t lda,
                              int64_t positions) {
    for (int o = 0; o < MR; ++o)
      for (int v = 0; v < VECTORS; ++v) dw[o][v] = Vector{};
    FASTCL_UNROLLED
    for (int64_t p = 0; p < positions; ++p, g += ldg, a += lda) {
      Vector row[VECTORS];
      for (int v = 0; v < VECTORS; ++v) row[v] = *reinterpret_cast<const Vector*>(a + v * WIDTH);
      for (int o = 0; o < MR; ++o)
        for (int v = 0; v < VECTORS; ++v) dw[o][v] += row[v] * g[o];
    }
  }

  template <Reduce reduce>
  static FASTCL_HD void sum_samples(const T* g, const T* a, T* out, int64_t ldo, int64_t samples, int64_t positions) {
    for (int o = 0; o < MR; ++o)
      for (int v = 0; v < VECTORS; ++v) prefetch(out + o * ldo + v * WIDTH);
    Vector total[MR][VECTORS] = {};  // stays in L1; touched once per sample
    for (int64_t n = 0; n < samples; ++n) {
      Vector dw[MR][VECTORS];
      block(dw, g + n * positions * MR, MR, a + n * positions * NR, NR, positions);
      for (int o = 0; o < MR; ++o)
        for (int v = 0; v < VECTORS; ++v)
          total[o][v] += reduce == Reduce::square     ? dw[o][v] * dw[o][v]
                         : reduce == Reduce::absolute ? absolute(dw[o][v])
                                                      : dw[o][v];
    }
    for (int o = 0; o < MR; ++o)
      for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(out + o * ldo + v * WIDTH) += total[o][v];
  }

  static FASTCL_HD void add_rows(const T* g, int64_t ldg, const T* a, int64_t lda, T* out, int64_t ldo,
                                 int64_t positions) {
    Vector dw[MR][VECTORS];
    block(dw, g, ldg, a, lda, positions);
    for (int o = 0; o < MR; ++o)
      for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(out + o * ldo + v * WIDTH) += dw[o][v];
  }

  static FASTCL_HD void triangle(const T* panels, int64_t rows, const T* a, T* out) {
    for (int64_t at = 0; at < rows; at += MR, panels += rows * MR) {
      Vector dw[MR][VECTORS];
      block(dw, panels, MR, a, NR, at + MR < rows ? at + MR : rows);
      for (int o = 0; o < MR; ++o)
        for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(out + (at + o) * NR + v * WIDTH) = dw[o][v];
    }
  }

  static FASTCL_HD void triangle_squares(const T* panels, int64_t rows, const T* a, T* out) {
    Vector total[VECTORS] = {};
    for (int64_t at = 0; at < rows; at += MR, panels += rows * MR) {
      Vector dw[MR][VECTORS];
      block(dw, panels, MR, a, NR, at + MR < rows ? at + MR : rows);
      for (int o = 0; o < MR; ++o)
        for (int v = 0; v < VECTORS; ++v) total[v] += dw[o][v] * dw[o][v];
    }
    for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(out + v * WIDTH) = total[v];
  }

  static FASTCL_HD void run(const T* g, const T* a, T* out, int64_t ldo, int64_t samples, int64_t positions,
                            Reduce reduce) {
    if (reduce == Reduce::square) return sum_samples<Reduce::square>(g, a, out, ldo, samples, positions);
    if (reduce == Reduce::absolute) return sum_samples<Reduce::absolute>(g, a, out, ldo, samples, positions);
    sum_samples<Reduce::plain>(g, a, out, ldo, samples, positions);
  }
};

template <class T>
struct TileChoice {
  int mr, nr;
  TileFunction<T> run;
  // out [mr][nr] += g^T a with rows of g and a as they lie: g is [positions][ldg], a is [positions][lda]
  void (*add_rows)(const T* g, int64_t ldg, const T* a, int64_t lda, T* out, int64_t ldo, int64_t positions);
  // L a for a lower triangle L [rows][rows] in panels [rows / mr][rows][mr] (gmm/blocks.h) and a [rows][nr]: the
  // product [rows, up to a multiple of mr][nr], or the sum over its rows of their squares, [nr]
  void (*triangle)(const T* panels, int64_t rows, const T* a, T* out);
  void (*triangle_squares)(const T* panels, int64_t rows, const T* a, T* out);
};
template <class T>
TileChoice<T> choose_tile();  // for this CPU; float and double

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fastcl

// accumulate_outer_: out[o, i] += sum_n | sum_p g[n, p, o] a[n, p, i] |^power.
// One position per sample factorises into (|g|^power)^T |a|^power, an ordinary matrix product; several do not.
#include <memory>

#include "../common/cpu.h"
#include "tile.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "accumulate_outer_";
// Rows (samples x positions) packed at a time: a 48-float panel of 256 rows is 48 KiB, one L1 of the CPUs measured.
constexpr int64_t kRows = 256;

template <class T>
struct TileChoice {
  int mr, nr;
  TileFunction<T> run;
};

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

// One operand, [samples, positions, features] by strides in elements.
struct Operand {
  const void* data;
  int64_t samples, positions, features;
  int64_t sample_stride, position_stride, feature_stride;
};

// Panel: rows x width values, zero beyond `features`; |.|^power applied here when the product factorises.
template <class T, class In, int power>  // power 0: as it is
struct PackPanel {
  static FASTCL_HD void run(T* panel, const Operand* from, int64_t row_begin, int64_t row_end, int64_t feature,
                            int64_t width) {
    const int64_t used = from->features - feature < width ? from->features - feature : width;
    const In* base = static_cast<const In*>(from->data) + feature * from->feature_stride;
    for (int64_t row = row_begin; row < row_end; ++row, panel += width) {
      const In* x = base + row / from->positions * from->sample_stride + row % from->positions * from->position_stride;
      for (int64_t k = 0; k < used; ++k) {
        const T value = static_cast<T>(load(x + k * from->feature_stride));
        panel[k] = power == 0 ? value : importance_of<power>(value);
      }
      for (int64_t k = used; k < width; ++k) panel[k] = T(0);
    }
  }
};

template <class T, class In>
void pack(T* panel, const Operand& from, int64_t row_begin, int64_t row_end, int64_t feature, int64_t width,
          int power) {
  if (power == 2) return simd<PackPanel<T, In, 2>>(panel, &from, row_begin, row_end, feature, width);
  if (power == 1) return simd<PackPanel<T, In, 1>>(panel, &from, row_begin, row_end, feature, width);
  simd<PackPanel<T, In, 0>>(panel, &from, row_begin, row_end, feature, width);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, class In>
void accumulate(T* out, const Operand& g, const Operand& a, int power) {
  const TileChoice<T> tile = choose_tile<T>();
  const bool factorises = g.positions == 1;
  const int pack_power = factorises ? power : 0;
  const Reduce reduce = factorises ? Reduce::plain : power == 2 ? Reduce::square : Reduce::absolute;
  const int64_t block = std::max<int64_t>(1, kRows / g.positions);  // samples per block
  const int64_t g_panels = ceil_div(g.features, tile.mr), a_panels = ceil_div(a.features, tile.nr);
  // Enough tasks for the threads even when the weight is narrow; each task packs its activation panel itself.
  const int64_t groups = std::min(g_panels, ceil_div(8, a_panels));
  const int64_t rows_max = std::min(block, g.samples) * g.positions;
  std::unique_ptr<T[]> g_packed(new T[g_panels * tile.mr * rows_max]);

  for (int64_t n0 = 0; n0 < g.samples; n0 += block) {
    const int64_t n1 = std::min(g.samples, n0 + block), rows = (n1 - n0) * g.positions;
    const int64_t row0 = n0 * g.positions, row1 = n1 * g.positions;
    const int64_t tile_samples = factorises ? 1 : n1 - n0, tile_positions = factorises ? rows : g.positions;
    par_for(0, g_panels, std::max<int64_t>(1, 32768 / (rows * tile.mr)), [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q)
        pack<T, In>(g_packed.get() + q * tile.mr * rows, g, row0, row1, q * tile.mr, tile.mr, pack_power);
    });
    const int64_t flops_per_task = rows * tile.nr * ceil_div(g_panels, groups) * tile.mr;
    par_for(0, a_panels * groups, std::max<int64_t>(1, 1000000 / flops_per_task), [&](int64_t first, int64_t last) {
      std::unique_ptr<T[]> a_packed(new T[rows * tile.nr]);
      std::unique_ptr<T[]> edge(new T[tile.mr * tile.nr]);
      int64_t packed = -1;
      for (int64_t task = first; task < last; ++task) {
        const int64_t panel = task / groups, i0 = panel * tile.nr;
        if (panel != packed) pack<T, In>(a_packed.get(), a, row0, row1, i0, tile.nr, pack_power);
        packed = panel;
        const int64_t columns = std::min<int64_t>(tile.nr, a.features - i0);
        for (int64_t q = g_panels * (task % groups) / groups; q < g_panels * (task % groups + 1) / groups; ++q) {
          const int64_t o0 = q * tile.mr, lines = std::min<int64_t>(tile.mr, g.features - o0);
          const T* g_panel = g_packed.get() + q * tile.mr * rows;
          T* corner = out + o0 * a.features + i0;
          if (lines == tile.mr && columns == tile.nr) {
            tile.run(g_panel, a_packed.get(), corner, a.features, tile_samples, tile_positions, reduce);
            continue;
          }
          std::fill_n(edge.get(), tile.mr * tile.nr, T(0));
          tile.run(g_panel, a_packed.get(), edge.get(), tile.nr, tile_samples, tile_positions, reduce);
          for (int64_t o = 0; o < lines; ++o)
            for (int64_t i = 0; i < columns; ++i) corner[o * a.features + i] += edge[o * tile.nr + i];
        }
      }
    });
  }
}

Operand operand(const Tensor& t) {
  const bool tokens = t.dim() == 3;
  return {t.const_data_ptr(),       t.size(0),   tokens ? t.size(1) : 1, t.size(-1), t.stride(0),
          tokens ? t.stride(1) : 0, t.stride(-1)};
}

void accumulate_outer_(Tensor out, Tensor grad, Tensor activation, int64_t power) {
  FASTCL_CHECK(power == 1 || power == 2, kOp, ": power is ", power, " but must be 1 or 2");
  check_output(out, kOp, "out");
  FASTCL_CHECK(out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::Double, kOp,
               ": out must be float32 or float64, the types that sums are kept in");
  FASTCL_CHECK(grad.is_cpu() && activation.is_cpu(), kOp, ": grad and activation must be CPU tensors like out");
  dispatch_float(grad.scalar_type(), kOp, "grad", [](auto) {});
  check_same_dtype(activation, grad, kOp, "activation", "grad");
  FASTCL_CHECK(grad.dim() == 2 || grad.dim() == 3, kOp, ": grad must be [N, O] or [N, P, O], not of dimension ",
               grad.dim());
  FASTCL_CHECK(activation.dim() == grad.dim() && activation.size(0) == grad.size(0) &&
                   (grad.dim() == 2 || activation.size(1) == grad.size(1)),
               kOp, ": activation must have the samples (and positions) of grad");
  FASTCL_CHECK(out.dim() == 2 && out.size(0) == grad.size(-1) && out.size(1) == activation.size(-1), kOp,
               ": out must be [O, I] with the last sizes of grad and activation, [", grad.size(-1), ", ",
               activation.size(-1), "]");
  check_distinct({out}, {}, kOp, "out", {});
  const Tensors inputs = {grad, activation};
  check_distinct({out}, {&inputs}, kOp, "out", {"grad, activation"});
  if (grad.numel() == 0 || activation.numel() == 0) return;
  Tensor work = torch::stable::contiguous(out);
  dispatch_float(grad.scalar_type(), kOp, "grad", [&](auto type) {
    using In = decltype(type);
    if (out.scalar_type() == ScalarType::Double)
      accumulate<double, In>(static_cast<double*>(work.mutable_data_ptr()), operand(grad), operand(activation),
                             static_cast<int>(power));
    else
      accumulate<float, In>(static_cast<float*>(work.mutable_data_ptr()), operand(grad), operand(activation),
                            static_cast<int>(power));
  });
  if (!out.is_contiguous()) torch::stable::copy_(out, work);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("accumulate_outer_", TORCH_BOX(&accumulate_outer_)); }

}  // namespace fastcl

// accumulate_outer_: out[o, i] += sum_n | sum_p g[n, p, o] a[n, p, i] |^power.
// One position per sample factorises into (|g|^power)^T |a|^power, an ordinary matrix product; several do not.
#include "panels.h"

namespace fastcl {

namespace {

constexpr const char* kOp = "accumulate_outer_";
// Rows (samples x positions) packed at a time: a 48-float panel of 256 rows is 48 KiB, one L1 of the CPUs measured.
constexpr int64_t kRows = 256;

// Few samples: out[o] += sum_n g[n][o] a[n], row by row, as it lies in memory; a tile's columns would not.
constexpr int64_t kFewRows = 8;

template <class T>
struct AddFew {  // out[i] += sum_n g[n] a[n][i]
  static FASTCL_HD void run(T* FASTCL_RESTRICT out, const T* g, int64_t g_stride, const T* FASTCL_RESTRICT a,
                            int64_t samples, int64_t inputs) {
    using Vector = typename Lanes<T, kLanes>::Vector;
    int64_t i = 0;
    for (; i + kLanes <= inputs; i += kLanes) {
      Vector sum = *reinterpret_cast<const Vector*>(out + i);
      for (int64_t n = 0; n < samples; ++n)
        sum += *reinterpret_cast<const Vector*>(a + n * inputs + i) * g[n * g_stride];
      *reinterpret_cast<Vector*>(out + i) = sum;
    }
    for (; i < inputs; ++i)
      for (int64_t n = 0; n < samples; ++n) out[i] += a[n * inputs + i] * g[n * g_stride];
  }
};

template <class T, class In>
void accumulate_few(T* out, const Operand& g, const Operand& a, int power) {
  const Aligned<T> g_raised = aligned<T>(g.samples * g.features + 16),
                   a_raised = aligned<T>(g.samples * a.features + 16);
  pack<T, In>(g_raised.get(), g, 0, g.samples, 0, g.features, power);
  pack<T, In>(a_raised.get(), a, 0, g.samples, 0, a.features, power);
  par_pieces(g.features, std::max<int64_t>(1, 32768 / a.features), [&](int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o)
      simd<AddFew<T>>(out + o * a.features, static_cast<const T*>(g_raised.get() + o), g.features,
                      static_cast<const T*>(a_raised.get()), g.samples, a.features);
  });
}

template <class T, class In>
void accumulate(T* out, const Operand& g, const Operand& a, int power, bool whole = true) {
  if (whole && is_narrow(g.features * a.features, g.samples, g.positions))
    return by_samples(out, g.features * a.features, g.samples, [&](T* sums, int64_t first, int64_t last) {
      accumulate<T, In>(sums, samples_of<In>(g, first, last), samples_of<In>(a, first, last), power, false);
    });
  const bool factorises = g.positions == 1;
  if (factorises && g.samples <= kFewRows && a.features >= 64) return accumulate_few<T, In>(out, g, a, power);
  const TileChoice<T> tile = choose_tile<T>();
  const int pack_power = factorises ? power : 0;
  const int64_t per_block = std::max<int64_t>(1, kRows / g.positions);
  const int64_t panels = ceil_div(g.features, tile.mr);
  std::unique_ptr<T[]> g_packed(new T[panels * tile.mr * std::min(per_block, g.samples) * g.positions]);

  for (int64_t n0 = 0; n0 < g.samples; n0 += per_block) {
    const int64_t samples = std::min(per_block, g.samples - n0), rows = samples * g.positions;
    const int64_t row0 = n0 * g.positions, row1 = row0 + rows;
    par_pieces(panels, std::max<int64_t>(1, 32768 / (rows * tile.mr)), [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q)
        pack<T, In>(g_packed.get() + q * tile.mr * rows, g, row0, row1, q * tile.mr, tile.mr, pack_power);
    });
    const Block<T> block = {tile,
                            1,
                            g.features,
                            a.features,
                            rows,
                            factorises ? 1 : samples,
                            factorises ? rows : g.positions,
                            factorises   ? Reduce::plain
                            : power == 2 ? Reduce::square
                                         : Reduce::absolute,
                            g_packed.get()};
    multiply(out, block, [&](T* panel, int64_t, int64_t feature) {
      pack<T, In>(panel, a, row0, row1, feature, tile.nr, pack_power);
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
  const Tensors inputs = {grad, activation};
  check_distinct({out}, {&inputs}, kOp, "out", {"grad, activation"});
  if (grad.numel() == 0 || activation.numel() == 0) return;
  Tensor work = row_major(out);
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

// Packed panels and the task loop around the register tile: what the dense and the convolutional form share.
#pragma once
#include <memory>

#include "../common/cpu.h"
#include "../common/tile.h"
#include "math.h"

namespace fastcl {

// One operand, [samples, positions, features] by strides in elements.
struct Operand {
  const void* data;
  int64_t samples, positions, features;
  int64_t sample_stride, position_stride, feature_stride;
};

template <class In>
Operand samples_of(Operand operand, int64_t first, int64_t last) {
  operand.data = static_cast<const In*>(operand.data) + first * operand.sample_stride;
  operand.samples = last - first;
  return operand;
}

constexpr int64_t kAhead = 8;  // rows fetched before they are packed

// Panel: rows x width values, zero beyond `features`; |.|^power applied here when the product factorises (0: not).
template <class T, class In, int power>
struct PackPanel {
  static FASTCL_HD T raised(T value) { return power == 0 ? value : importance_of<power>(value); }

  static FASTCL_HD void run(T* panel, const Operand* from, int64_t row_begin, int64_t row_end, int64_t feature,
                            int64_t width) {
    const int64_t used = from->features - feature < width ? from->features - feature : width;
    const In* base = static_cast<const In*>(from->data) + feature * from->feature_stride;
    const bool one = from->positions == 1;  // then a sample is a position
    const int64_t positions = one ? row_end : from->positions;
    const int64_t fs = from->feature_stride, ps = one ? from->sample_stride : from->position_stride;
    int64_t n = row_begin / positions, p = row_begin % positions;
    for (int64_t row = row_begin; row < row_end;) {
      const int64_t run = row_end - row < positions - p ? row_end - row : positions - p;
      const In* x = base + n * from->sample_stride + p * ps;
      if (fs == 1) {
        for (int64_t r = 0; r < run; ++r) {  // a row's few lines lie apart from the next one's: the CPU doesn't see it
          const char* later = reinterpret_cast<const char*>(x) + (r + kAhead) * ps * static_cast<int64_t>(sizeof(In));
          for (size_t byte = 0; byte < used * sizeof(In); byte += 64) prefetch_read(later + byte);
          copy_features(panel + r * width, x + r * ps, 1, used, width);
        }
      } else if (ps == 1) {  // positions are neighbours in memory: read along them
        for (int64_t k = 0; k < used; ++k)
          for (int64_t r = 0; r < run; ++r) panel[r * width + k] = raised(static_cast<T>(load(x + k * fs + r)));
        for (int64_t k = used; k < width; ++k)
          for (int64_t r = 0; r < run; ++r) panel[r * width + k] = T(0);
      } else {
        for (int64_t r = 0; r < run; ++r) copy_features(panel + r * width, x + r * ps, fs, used, width);
      }
      panel += run * width;
      row += run;
      p = 0;
      ++n;
    }
  }

  static FASTCL_HD void copy_features(T* to, const In* x, int64_t stride, int64_t used, int64_t width) {
    for (int64_t k = 0; k < used; ++k) to[k] = raised(static_cast<T>(load(x + k * stride)));
    for (int64_t k = used; k < width; ++k) to[k] = T(0);
  }
};

template <class T, class In>
void pack(T* panel, const Operand& from, int64_t row_begin, int64_t row_end, int64_t feature, int64_t width,
          int power) {
  if (power == 2) return simd<PackPanel<T, In, 2>>(panel, &from, row_begin, row_end, feature, width);
  if (power == 1) return simd<PackPanel<T, In, 1>>(panel, &from, row_begin, row_end, feature, width);
  simd<PackPanel<T, In, 0>>(panel, &from, row_begin, row_end, feature, width);
}

// A block of rows (samples x positions), its gradient panels packed; `groups` independent products of the same shape.
template <class T>
struct Block {
  TileChoice<T> tile;
  int64_t groups, outputs, inputs;  // of one group
  int64_t rows, samples, positions;
  Reduce reduce;
  const T* g_packed;  // [groups][panels][rows][mr]

  int64_t g_panels() const { return ceil_div(outputs, tile.mr); }
};

// out[group][o][i] += the block's share; pack_a(panel, group, first feature) packs rows x nr activations.
template <class T, class PackA>
void multiply(T* out, const Block<T>& block, const PackA& pack_a) {
  const TileChoice<T>& tile = block.tile;
  const int64_t g_panels = block.g_panels(), a_panels = ceil_div(block.inputs, tile.nr);
  // Enough tasks for the threads even when the weight is narrow; each task packs its activation panel itself.
  const int64_t splits = std::min(g_panels, ceil_div(8, a_panels * block.groups));
  const int64_t work = block.rows * tile.nr * ceil_div(g_panels, splits) * tile.mr;
  par_tasks(block.groups * a_panels * splits, std::max<int64_t>(1, 500000 / work), [&](Tasks::Share& share) {
    const Aligned<T> a_packed = aligned<T>(block.rows * tile.nr + 16);  // packing may write past a row
    const Aligned<T> edge = aligned<T>(tile.mr * tile.nr);
    int64_t packed = -1;
    for (int64_t task; (task = share.take()) >= 0;) {
      const int64_t split = task % splits, panel = task / splits, group = panel / a_panels;
      const int64_t i0 = panel % a_panels * tile.nr, columns = std::min<int64_t>(tile.nr, block.inputs - i0);
      if (panel != packed) pack_a(a_packed.get(), group, i0);
      packed = panel;
      for (int64_t q = g_panels * split / splits; q < g_panels * (split + 1) / splits; ++q) {
        const int64_t o0 = q * tile.mr, lines = std::min<int64_t>(tile.mr, block.outputs - o0);
        const T* g_panel = block.g_packed + (group * g_panels + q) * tile.mr * block.rows;
        T* corner = out + (group * block.outputs + o0) * block.inputs + i0;
        if (lines == tile.mr && columns == tile.nr) {
          tile.run(g_panel, a_packed.get(), corner, block.inputs, block.samples, block.positions, block.reduce);
          continue;
        }
        std::fill_n(edge.get(), tile.mr * tile.nr, T(0));
        tile.run(g_panel, a_packed.get(), edge.get(), tile.nr, block.samples, block.positions, block.reduce);
        for (int64_t o = 0; o < lines; ++o)
          for (int64_t i = 0; i < columns; ++i) corner[o * block.inputs + i] += edge[o * tile.nr + i];
      }
    }
  });
}

// A narrow weight has too few tiles to share among threads, and each block of rows would wait for all of them. Then the
// threads share samples: in chunks that depend on the problem alone, added up in order.
constexpr int64_t kSampleChunks = 16;
inline bool is_narrow(int64_t weights, int64_t samples, int64_t positions) {
  return weights <= 65536 && samples >= kSampleChunks && samples * positions >= 4096;
}

// run(sums, first sample, last sample) adds to `sums`, `size` values.
template <class T, class Run>
void by_samples(T* out, int64_t size, int64_t samples, const Run& run) {
  const int64_t each = ceil_div(samples, kSampleChunks), chunks = ceil_div(samples, each);
  std::unique_ptr<T[]> sums(new T[chunks * size]());
  par_tasks(chunks, 1, [&](Tasks::Share& share) {
    for (int64_t chunk; (chunk = share.take()) >= 0;)
      run(sums.get() + chunk * size, chunk * each, std::min(samples, (chunk + 1) * each));
  });
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) out[i] += sums[chunk * size + i];
}

}  // namespace fastcl

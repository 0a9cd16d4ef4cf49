// accumulate_conv_: the per-sample weight gradients of a convolution, to a power, summed.
// im2col never exists as a matrix: a block of samples is laid out once with channels last and a border of zeros, and
// each 48-wide panel is copied from it in runs of neighbouring channels, just before the tile uses it.
#include "panels.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "accumulate_conv_";
// Rows packed at a time. More than accumulate_outer_'s 256, since the channels-last copy is shared by all panels;
// the panel (192 KiB) then lives in L2.
constexpr int64_t kRows = 1024;

// Always three spatial dimensions; missing ones have size 1.
struct Geometry {
  int64_t samples, groups, channels, outputs;  // channels of `input`, outputs = channels of `grad`
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  int64_t in_strides[5];  // of `input`, [n, c, d, h, w]

  int64_t positions() const { return out[0] * out[1] * out[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
  int64_t padded(int d) const {  // what the kernel can touch
    return std::max(in[d] + padding[d], (out[d] - 1) * stride[d] + (kernel[d] - 1) * dilation[d] + 1);
  }
};

// One sample's input as [D][H][W][C] with zeros around it.
template <class T, class In>
struct ChannelsLast {
  static FASTCL_HD void run(T* to, const In* from, const Geometry* geo, int64_t d) {
    const int64_t c_n = geo->channels, w_n = geo->padded(2), h_n = geo->padded(1);
    const int64_t* s = geo->in_strides;
    const int64_t id = d - geo->padding[0];
    for (int64_t h = 0; h < h_n; ++h) {
      T* row = to + (d * h_n + h) * w_n * c_n;
      const int64_t ih = h - geo->padding[1];
      if (id < 0 || id >= geo->in[0] || ih < 0 || ih >= geo->in[1]) {
        for (int64_t k = 0; k < w_n * c_n; ++k) row[k] = T(0);
        continue;
      }
      const In* x = from + id * s[2] + ih * s[3];
      const int64_t left = geo->padding[2] * c_n, used = geo->in[2] * c_n;
      for (int64_t k = 0; k < left; ++k) row[k] = T(0);
      for (int64_t k = left + used; k < w_n * c_n; ++k) row[k] = T(0);
      row += left;
      if (s[1] == 1) {
        for (int64_t w = 0; w < geo->in[2]; ++w)
          for (int64_t c = 0; c < c_n; ++c) row[w * c_n + c] = static_cast<T>(load(x + w * s[4] + c));
      } else {
        // 16 channels at a time keeps both the read rows and the written lines in L1
        for (int64_t c0 = 0; c0 < c_n; c0 += 16) {
          const int64_t c1 = c0 + 16 < c_n ? c0 + 16 : c_n;
          for (int64_t w = 0; w < geo->in[2]; ++w)
            for (int64_t c = c0; c < c1; ++c) row[w * c_n + c] = static_cast<T>(load(x + c * s[1] + w * s[4]));
        }
      }
    }
  }
};

constexpr int kSlack = 16;  // short segments (few channels) are copied in this length, known to the compiler

struct Segment {
  int64_t from, to, length;  // offset from a position's corner, offset in the panel's row, values
};

template <class T, int power>
struct CopySegments {
  static FASTCL_HD void run(T* panel, const T* corner, const int64_t* row_offsets, int64_t rows,
                            const Segment* segments, int64_t n_segments, int64_t width, int64_t used) {
    for (int64_t r = 0; r < rows; ++r, panel += width) {
      const T* x = corner + row_offsets[r];
      for (int64_t s = 0; s < n_segments; ++s) {
        const T* from = x + segments[s].from;
        T* to = panel + segments[s].to;
        if (segments[s].length <= kSlack) {  // what is too much is overwritten by the next segment, zeros or row
          T values[kSlack];
          for (int k = 0; k < kSlack; ++k) values[k] = power == 0 ? from[k] : importance_of<power>(from[k]);
          for (int k = 0; k < kSlack; ++k) to[k] = values[k];
          continue;
        }
        for (int64_t k = 0; k < segments[s].length; ++k) to[k] = power == 0 ? from[k] : importance_of<power>(from[k]);
      }
      for (int64_t k = used; k < width; ++k) panel[k] = T(0);
    }
  }
};

// out is [outputs][taps][channels / groups]
template <class T, class In>
void accumulate(T* out, const Operand& g, const In* input, const Geometry& geo, int power, bool whole = true) {
  const int64_t size = geo.outputs * (geo.channels / geo.groups) * geo.taps();
  if (whole && is_narrow(size, geo.samples, geo.positions()))
    return by_samples(out, size, geo.samples, [&](T* sums, int64_t first, int64_t last) {
      Geometry part = geo;
      part.samples = last - first;
      accumulate<T, In>(sums, samples_of<In>(g, first, last), input + first * geo.in_strides[0], part, power, false);
    });
  const TileChoice<T> tile = choose_tile<T>();
  const int64_t positions = geo.positions(), c_group = geo.channels / geo.groups, o_group = geo.outputs / geo.groups;
  const bool factorises = positions == 1;
  const int pack_power = factorises ? power : 0;
  const int64_t per_block = std::max<int64_t>(1, std::min(geo.samples, kRows / positions));
  const int64_t g_panels = ceil_div(o_group, tile.mr);
  const int64_t line = geo.padded(2) * geo.channels, plane = geo.padded(1) * line, volume = geo.padded(0) * plane;
  const int64_t max_rows = per_block * positions;
  std::unique_ptr<T[]> g_packed(new T[geo.groups * g_panels * tile.mr * max_rows]);
  std::unique_ptr<T[]> image(new T[per_block * volume + kSlack]());

  // where each row's receptive field begins, and where each tap of it lies
  std::vector<int64_t> row_offsets(max_rows);
  for (int64_t r = 0; r < max_rows; ++r) {
    const int64_t n = r / positions, p = r % positions;
    const int64_t d = p / (geo.out[1] * geo.out[2]), h = p / geo.out[2] % geo.out[1], w = p % geo.out[2];
    row_offsets[r] =
        n * volume + d * geo.stride[0] * plane + h * geo.stride[1] * line + w * geo.stride[2] * geo.channels;
  }
  std::vector<int64_t> tap_offsets;
  for (int64_t d = 0; d < geo.kernel[0]; ++d)
    for (int64_t h = 0; h < geo.kernel[1]; ++h)
      for (int64_t w = 0; w < geo.kernel[2]; ++w)
        tap_offsets.push_back(d * geo.dilation[0] * plane + h * geo.dilation[1] * line +
                              w * geo.dilation[2] * geo.channels);

  for (int64_t n0 = 0; n0 < geo.samples; n0 += per_block) {
    const int64_t samples = std::min(per_block, geo.samples - n0), rows = samples * positions;
    par_pieces(samples * geo.padded(0), std::max<int64_t>(1, 32768 / plane), [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; ++k)
        simd<ChannelsLast<T, In>>(image.get() + k / geo.padded(0) * volume,
                                  input + (n0 + k / geo.padded(0)) * geo.in_strides[0], &geo, k % geo.padded(0));
    });
    par_pieces(geo.groups * g_panels, std::max<int64_t>(1, 32768 / (rows * tile.mr)), [&](int64_t first, int64_t last) {
      for (int64_t q = first; q < last; ++q) {
        Operand part = g;  // one group's outputs
        part.features = o_group;
        part.data = static_cast<const In*>(g.data) + q / g_panels * o_group * g.feature_stride;
        pack<T, In>(g_packed.get() + q * tile.mr * rows, part, n0 * positions, n0 * positions + rows,
                    q % g_panels * tile.mr, tile.mr, pack_power);
      }
    });
    const Block<T> block = {tile,
                            geo.groups,
                            o_group,
                            c_group * geo.taps(),
                            rows,
                            factorises ? 1 : samples,
                            factorises ? rows : positions,
                            factorises   ? Reduce::plain
                            : power == 2 ? Reduce::square
                                         : Reduce::absolute,
                            g_packed.get()};
    multiply(out, block, [&](T* panel, int64_t group, int64_t feature) {
      const int64_t used = std::min<int64_t>(tile.nr, block.inputs - feature);
      std::vector<Segment> segments;
      for (int64_t k = 0; k < used;) {
        const int64_t c = (feature + k) % c_group, length = std::min(used - k, c_group - c);
        const int64_t from = tap_offsets[(feature + k) / c_group] + group * c_group + c;
        if (!segments.empty() && segments.back().from + segments.back().length == from)
          segments.back().length += length;
        else
          segments.push_back({from, k, length});
        k += length;
      }
      const auto copy = [&](auto body) {
        simd<decltype(body)>(panel, image.get(), row_offsets.data(), rows, segments.data(),
                             static_cast<int64_t>(segments.size()), static_cast<int64_t>(tile.nr), used);
      };
      if (pack_power == 2)
        copy(CopySegments<T, 2>{});
      else if (pack_power == 1)
        copy(CopySegments<T, 1>{});
      else
        copy(CopySegments<T, 0>{});
    });
  }
}

// out[o][c][tap] += sums[o][tap][c]
template <class T>
void add_transposed(T* out, const T* sums, int64_t outputs, int64_t channels, int64_t taps) {
  par_pieces(outputs, std::max<int64_t>(1, 32768 / (channels * taps)), [&](int64_t first, int64_t last) {
    for (int64_t o = first; o < last; ++o)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t t = 0; t < taps; ++t) out[(o * channels + c) * taps + t] += sums[(o * taps + t) * channels + c];
  });
}

void accumulate_conv_(Tensor out, Tensor grad, Tensor input, std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation, int64_t groups, int64_t power) {
  FASTCL_CHECK(power == 1 || power == 2, kOp, ": power is ", power, " but must be 1 or 2");
  check_output(out, kOp, "out");
  FASTCL_CHECK(out.scalar_type() == ScalarType::Float || out.scalar_type() == ScalarType::Double, kOp,
               ": out must be float32 or float64, the types that sums are kept in");
  FASTCL_CHECK(grad.is_cpu() && input.is_cpu(), kOp, ": grad and input must be CPU tensors like out");
  dispatch_float(grad.scalar_type(), kOp, "grad", [](auto) {});
  check_same_dtype(input, grad, kOp, "input", "grad");
  const int64_t spatial = out.dim() - 2;
  FASTCL_CHECK(spatial >= 1 && spatial <= 3, kOp, ": out must be [O, C / groups, kernel...] with 1 to 3 kernel sizes");
  FASTCL_CHECK(grad.dim() == out.dim() && input.dim() == out.dim() && grad.size(0) == input.size(0), kOp,
               ": grad and input must be [N, channels, spatial...] of the same N, with as many spatial sizes as out");
  FASTCL_CHECK(groups >= 1 && grad.size(1) == out.size(0) && input.size(1) % groups == 0 &&
                   input.size(1) / groups == out.size(1) && out.size(0) % groups == 0,
               kOp, ": out must be [channels of grad, channels of input / groups, kernel...]");
  FASTCL_CHECK(static_cast<int64_t>(stride.size()) == spatial && static_cast<int64_t>(padding.size()) == spatial &&
                   static_cast<int64_t>(dilation.size()) == spatial,
               kOp, ": stride, padding and dilation must each have ", spatial, " numbers");

  Geometry geo = {};
  geo.samples = input.size(0);
  geo.groups = groups;
  geo.channels = input.size(1);
  geo.outputs = grad.size(1);
  geo.in_strides[0] = input.stride(0);
  geo.in_strides[1] = input.stride(1);
  for (int d = 0; d < 3; ++d) {
    const int64_t s = d - (3 - spatial);
    const bool real = s >= 0;
    geo.in[d] = real ? input.size(s + 2) : 1;
    geo.out[d] = real ? grad.size(s + 2) : 1;
    geo.kernel[d] = real ? out.size(s + 2) : 1;
    geo.stride[d] = real ? stride[s] : 1;
    geo.padding[d] = real ? padding[s] : 0;
    geo.dilation[d] = real ? dilation[s] : 1;
    geo.in_strides[d + 2] = real ? input.stride(s + 2) : 0;
    FASTCL_CHECK(geo.stride[d] >= 1 && geo.dilation[d] >= 1 && geo.padding[d] >= 0, kOp,
                 ": stride and dilation must be at least 1, padding not negative");
    constexpr int64_t kMost = (int64_t(1) << 31) - 1;  // products of these and sizes fit into int64
    FASTCL_CHECK(geo.stride[d] <= kMost && geo.dilation[d] <= kMost && geo.padding[d] <= kMost, kOp,
                 ": stride, padding and dilation must be less than 2^31");
    FASTCL_CHECK(geo.out[d] == 0 || (geo.out[d] - 1) * geo.stride[d] + (geo.kernel[d] - 1) * geo.dilation[d] <
                                        geo.in[d] + 2 * geo.padding[d],
                 kOp, ": grad has more positions than this stride, padding and dilation give for input");
  }
  const Tensors inputs = {grad, input};
  check_distinct({out}, {&inputs}, kOp, "out", {"grad, input"});
  if (grad.numel() == 0 || input.numel() == 0 || out.numel() == 0) return;

  // positions must lie at one stride: true for contiguous and channels_last, else one copy
  int64_t expected = grad.stride(-1);
  bool even = true;
  for (int64_t d = grad.dim() - 1; d >= 2; --d) {
    even &= grad.size(d) == 1 || grad.stride(d) == expected;
    expected *= grad.size(d);
  }
  if (!even) grad = row_major(grad);
  const Operand g = {grad.const_data_ptr(), geo.samples,     geo.positions(), geo.outputs,
                     grad.stride(0),        grad.stride(-1), grad.stride(1)};

  Tensor work = row_major(out);
  dispatch_float(grad.scalar_type(), kOp, "grad", [&](auto type) {
    using In = decltype(type);
    const auto run = [&](auto sum_type) {
      using T = decltype(sum_type);
      const int64_t c_group = geo.channels / groups;
      T* total = static_cast<T*>(work.mutable_data_ptr());
      const In* x = static_cast<const In*>(input.const_data_ptr());
      if (c_group == 1 || geo.taps() == 1) {  // [O][C][taps] and [O][taps][C] are the same
        accumulate<T, In>(total, g, x, geo, static_cast<int>(power));
        return;
      }
      std::unique_ptr<T[]> sums(new T[out.numel()]());
      accumulate<T, In>(sums.get(), g, x, geo, static_cast<int>(power));
      add_transposed(total, sums.get(), geo.outputs, c_group, geo.taps());
    };
    if (out.scalar_type() == ScalarType::Double)
      run(double{});
    else
      run(float{});
  });
  if (!out.is_contiguous()) torch::stable::copy_(out, work);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("accumulate_conv_", TORCH_BOX(&accumulate_conv_)); }

}  // namespace fastcl

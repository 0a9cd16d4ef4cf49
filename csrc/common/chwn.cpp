// Convolutions with the batch last, [C, H, W, N]: images lie side by side in a vector's lanes, so that small maps and
// few channels fill it, and what lies in the padding is left out instead of multiplied by 0. Three ops, each linear in
// both of its tensors, and each one's gradients are the other two (fastcl/ops/_chwn.py).
#include <memory>

#include "cpu.h"
#include "lanes.h"
#include "tile.h"

namespace fastcl {
namespace {

// The sides of a convolution: x [channels, in, N] and y [outputs, out, N], with weight [outputs, channels, kernel].
struct Geometry {
  int64_t channels, outputs, n;
  int64_t in[2], out[2], kernel[2];
  int64_t stride, padding;

  int64_t taps() const { return kernel[0] * kernel[1]; }
};

// One tap's partner: the place in `in` of (place in out, tap), or the place in `out` of (place in in, tap); -1: none.
FASTCL_HD int64_t in_of(const Geometry& g, int d, int64_t out, int64_t tap) {
  const int64_t at = out * g.stride + tap - g.padding;
  return at >= 0 && at < g.in[d] ? at : -1;
}
FASTCL_HD int64_t out_of(const Geometry& g, int d, int64_t in, int64_t tap) {
  const int64_t at = in + g.padding - tap;
  return at >= 0 && at % g.stride == 0 && at / g.stride < g.out[d] ? at / g.stride : -1;
}

// ---- to[row, place, n] = sum over taps and k of weight[row, k, tap] from[k, place's partner by the tap, n] ----
// Forward (rows are outputs, k channels) and the gradient of the input (rows are channels, k outputs).

constexpr int kRowSizes[] = {8, 4, 2, 1};  // rows whose sums are in registers at once: as many as there are, in such

template <class T>
struct Product {
  Geometry g;
  bool forward;
  int64_t rows, inner;            // of `to`, and of `from`
  const int64_t *at, *from_size;  // `to`'s and `from`'s maps
  const T* from;
  const T* weight;  // packed [block of rows][tap][k][rows of the block]
  T* to;
};

template <class T>
std::unique_ptr<T[]> packed(const Product<T>& p, const T* weight) {
  const int64_t taps = p.g.taps(), c = p.g.channels;
  std::unique_ptr<T[]> all(new T[p.rows * p.inner * taps]);
  T* next = all.get();
  int64_t first = 0;
  for (int size : kRowSizes)
    for (; p.rows - first >= size; first += size)
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t k = 0; k < p.inner; ++k)
          for (int64_t r = first; r < first + size; ++r)
            *next++ = weight[(p.forward ? r * c + k : k * c + r) * taps + tap];
  return all;
}

template <class T, int bytes>
struct Multiply {
  static constexpr int kLane = bytes / static_cast<int>(sizeof(T));
  using Vector = typename Lanes<T, kLane>::Vector;

  // What a place of `to` is made of: for each tap with a partner, its offset in `from`'s map and its number.
  struct Taps {
    int64_t count = 0;
    int64_t* offset;
    int64_t* number;
  };

  template <int ROWS, int VECTORS>
  static FASTCL_HD void block(const Product<T>& p, const T* from, int64_t step, const Taps& taps, const T* weight,
                              T* to, int64_t row) {
    Vector sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) sums[r][v] = Vector{};
    for (int64_t t = 0; t < taps.count; ++t) {
      const T* x = from + taps.offset[t];
      const T* w = weight + taps.number[t] * p.inner * ROWS;
      for (int64_t k = 0; k < p.inner; ++k, x += step, w += ROWS) {
        Vector value[VECTORS];
        for (int v = 0; v < VECTORS; ++v) value[v] = *reinterpret_cast<const Vector*>(x + v * kLane);
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) sums[r][v] += value[v] * w[r];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v) *reinterpret_cast<Vector*>(to + r * row + v * kLane) = sums[r][v];
  }

  template <int VECTORS>
  static FASTCL_HD void place(const Product<T>& p, int64_t at, int64_t n, const Taps& taps) {
    const int64_t row = p.at[0] * p.at[1] * p.g.n, step = p.from_size[0] * p.from_size[1] * p.g.n;
    const T *from = p.from + n, *weight = p.weight;
    T* to = p.to + at * p.g.n + n;
    int64_t left = p.rows;
    const auto blocks = [&](auto size) FASTCL_LAMBDA_HD {
      constexpr int kRows = decltype(size)::value;
      for (; left >= kRows; left -= kRows, to += kRows * row, weight += kRows * p.inner * p.g.taps())
        block<kRows, VECTORS>(p, from, step, taps, weight, to, row);
    };
    blocks(std::integral_constant<int, kRowSizes[0]>{});
    blocks(std::integral_constant<int, kRowSizes[1]>{});
    blocks(std::integral_constant<int, kRowSizes[2]>{});
    blocks(std::integral_constant<int, kRowSizes[3]>{});
  }

  static FASTCL_HD void run(const Product<T>* product, int64_t* scratch, int64_t at) {
    const Product<T>& p = *product;
    const int64_t i = at / p.at[1], j = at % p.at[1];
    Taps taps{0, scratch, scratch + p.g.taps()};
    for (int64_t a = 0; a < p.g.kernel[0]; ++a) {
      const int64_t y = p.forward ? in_of(p.g, 0, i, a) : out_of(p.g, 0, i, a);
      for (int64_t b = 0; b < p.g.kernel[1] && y >= 0; ++b) {
        const int64_t x = p.forward ? in_of(p.g, 1, j, b) : out_of(p.g, 1, j, b);
        if (x < 0) continue;
        taps.offset[taps.count] = (y * p.from_size[1] + x) * p.g.n;
        taps.number[taps.count++] = a * p.g.kernel[1] + b;
      }
    }
    int64_t n = 0;
    for (; n + 2 * kLane <= p.g.n; n += 2 * kLane) place<2>(p, at, n, taps);
    if (n < p.g.n) place<1>(p, at, n, taps);
  }
};

template <class T>
struct MultiplyOf {
  template <int bytes>
  using Body = Multiply<T, bytes>;
};

template <class T>
void multiply(const Geometry& g, bool forward, const T* from, const T* weight, T* to) {
  Product<T> p{
      g,       forward, forward ? g.outputs : g.channels, forward ? g.channels : g.outputs, nullptr, nullptr, from,
      nullptr, to};
  p.at = forward ? p.g.out : p.g.in;
  p.from_size = forward ? p.g.in : p.g.out;
  const auto w = packed(p, weight);
  p.weight = w.get();
  const int64_t cost = std::max<int64_t>(1, p.rows * p.inner * g.taps() * g.n / (forward ? 1 : g.stride * g.stride));
  par_tasks(p.at[0] * p.at[1], std::max<int64_t>(1, 262144 / cost), [&](Tasks::Share& share) {
    std::unique_ptr<int64_t[]> scratch(new int64_t[2 * g.taps()]);
    for (int64_t at; (at = share.take()) >= 0;)
      simd_of_width<MultiplyOf<T>::template Body>(static_cast<const Product<T>*>(&p), scratch.get(), at);
  });
}

// ---- weight[o, c, tap] = sum over places and n of y[o, place, n] x[c, place's partner by the tap, n] ----

template <class T>
struct Outer {
  Geometry g;
  const T *y, *x;
  T* weight;
};

constexpr int kOutputs = 4;  // times channels: 16 sums in 32 registers, or 8 in 16
constexpr int channels_at_once(int bytes) { return bytes == 64 ? 4 : 2; }
FASTCL_HD int64_t block_channels(const Geometry& g, int bytes) { return g.channels == 1 ? 1 : channels_at_once(bytes); }

template <class T, int bytes>
struct Correlate {
  static constexpr int kLane = bytes / static_cast<int>(sizeof(T));
  using Vector = typename Lanes<T, kLane>::Vector;

  // weight[o ... , c ... , tap]; beyond the last feature the last one again, whose sums are left out
  template <int CHANNELS>
  static FASTCL_HD void block(const Outer<T>& p, int64_t o, int64_t c, int64_t a, int64_t b) {
    const Geometry& g = p.g;
    const T *y[kOutputs], *x[CHANNELS];
    for (int r = 0; r < kOutputs; ++r)
      y[r] = p.y + (o + r < g.outputs ? o + r : g.outputs - 1) * g.out[0] * g.out[1] * g.n;
    for (int q = 0; q < CHANNELS; ++q)
      x[q] = p.x + (c + q < g.channels ? c + q : g.channels - 1) * g.in[0] * g.in[1] * g.n;
    Vector sum[kOutputs][CHANNELS];
    for (int r = 0; r < kOutputs; ++r)
      for (int q = 0; q < CHANNELS; ++q) sum[r][q] = Vector{};
    for (int64_t i = 0; i < g.out[0]; ++i) {
      const int64_t row = in_of(g, 0, i, a);
      for (int64_t j = 0; j < g.out[1] && row >= 0; ++j) {
        const int64_t column = in_of(g, 1, j, b);
        if (column < 0) continue;
        const int64_t at_y = (i * g.out[1] + j) * g.n, at_x = (row * g.in[1] + column) * g.n;
        for (int64_t n = 0; n < g.n; n += kLane) {
          Vector value[CHANNELS];
          for (int q = 0; q < CHANNELS; ++q) value[q] = *reinterpret_cast<const Vector*>(x[q] + at_x + n);
          for (int r = 0; r < kOutputs; ++r) {
            const Vector other = *reinterpret_cast<const Vector*>(y[r] + at_y + n);
            for (int q = 0; q < CHANNELS; ++q) sum[r][q] += other * value[q];
          }
        }
      }
    }
    for (int r = 0; r < kOutputs; ++r)
      for (int q = 0; q < CHANNELS; ++q) {
        T lane[kLane];
        *reinterpret_cast<Vector*>(lane) = sum[r][q];
        for (int half = kLane / 2; half > 0; half /= 2)
          for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
        if (o + r < g.outputs && c + q < g.channels)
          p.weight[((o + r) * g.channels + c + q) * g.taps() + a * g.kernel[1] + b] = lane[0];
      }
  }

  static FASTCL_HD void run(const Outer<T>* outer, int64_t task) {
    const Geometry& g = outer->g;
    const int64_t width = block_channels(g, bytes), across = (g.channels + width - 1) / width;
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      const int64_t o = task / across * kOutputs, c = task % across * width;
      const int64_t a = tap / g.kernel[1], b = tap % g.kernel[1];
      width == 1 ? block<1>(*outer, o, c, a, b) : block<channels_at_once(bytes)>(*outer, o, c, a, b);
    }
  }
};

template <class T>
struct CorrelateOf {
  template <int bytes>
  using Body = Correlate<T, bytes>;
};

template <class T>
void correlate(const Geometry& g, const T* y, const T* x, T* weight) {
  const Outer<T> p{g, y, x, weight};
  const int64_t width = block_channels(g, vector_bytes());
  const int64_t tasks = ceil_div(g.outputs, kOutputs) * ceil_div(g.channels, width);
  const int64_t cost = kOutputs * width * g.taps() * g.out[0] * g.out[1] * g.n;
  par_tasks(tasks, std::max<int64_t>(1, 262144 / cost), [&](Tasks::Share& share) {
    for (int64_t task; (task = share.take()) >= 0;) simd_of_width<CorrelateOf<T>::template Body>(&p, task);
  });
}

// ---- the ops ----

void check_map(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FASTCL_CHECK(t.is_cpu() && t.dim() == 4, op, ": ", name, " must be a CPU tensor of 4 dimensions");
  const ScalarType dtype = t.scalar_type();
  FASTCL_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op, ": ", name,
               " must be float32 or float64");
  check_same_dtype(t, like, op, name, "the other");
  for (int d = 0; d < 4; ++d) FASTCL_CHECK(t.size(d) > 0, op, ": ", name, " is empty");
}

Geometry geometry(const char* op, int64_t channels, int64_t outputs, int64_t n, std::pair<int64_t, int64_t> in,
                  std::pair<int64_t, int64_t> kernel, int64_t stride, int64_t padding) {
  FASTCL_CHECK(stride >= 1 && padding >= 0, op, ": stride is ", stride, " and padding ", padding,
               " but must be at least 1 and 0");
  Geometry g{channels, outputs, n, {in.first, in.second}, {}, {kernel.first, kernel.second}, stride, padding};
  for (int d = 0; d < 2; ++d) {
    FASTCL_CHECK(g.in[d] >= 1 && g.kernel[d] >= 1 && g.in[d] + 2 * padding >= g.kernel[d], op, ": a map of ", g.in[d],
                 " with padding ", padding, " is smaller than the kernel, ", g.kernel[d]);
    g.out[d] = (g.in[d] + 2 * padding - g.kernel[d]) / stride + 1;
  }
  return g;
}

void check_y(const char* op, const char* name, const Tensor& y, const Geometry& g) {
  FASTCL_CHECK(y.size(0) == g.outputs && y.size(1) == g.out[0] && y.size(2) == g.out[1] && y.size(3) == g.n, op, ": ",
               name, " must be [", g.outputs, ", ", g.out[0], ", ", g.out[1], ", ", g.n, "]");
}

int64_t lanes_of(const Tensor& t) { return vector_bytes() / (t.scalar_type() == ScalarType::Double ? 8 : 4); }

// Contiguous, and its last dimension filled up with zeros to a multiple of a vector's lanes.
Tensor filled(const Tensor& t) {
  const int64_t n = t.size(3), more = (lanes_of(t) - n % lanes_of(t)) % lanes_of(t);
  if (more == 0) return row_major(t);
  Tensor wide = torch::stable::fill_(fresh({t.size(0), t.size(1), t.size(2), n + more}, t.scalar_type()), 0.0);
  Tensor used = torch::stable::narrow(wide, 3, 0, n);
  torch::stable::copy_(used, t);
  return wide;
}

template <class F>
void dispatch(const Tensor& t, const F& f) {
  t.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

Tensor product(bool forward, Geometry g, const Tensor& given, const Tensor& weight) {
  const int64_t n = g.n;
  const Tensor from = filled(given), w = row_major(weight);
  g.n = from.size(3);
  const int64_t* size = forward ? g.out : g.in;
  Tensor to = fresh({forward ? g.outputs : g.channels, size[0], size[1], g.n}, given.scalar_type());
  dispatch(given, [&](auto type) {
    using T = decltype(type);
    multiply(g, forward, static_cast<const T*>(from.const_data_ptr()), static_cast<const T*>(w.const_data_ptr()),
             static_cast<T*>(to.mutable_data_ptr()));
  });
  if (n == g.n) return to;
  Tensor used = torch::stable::narrow(to, 3, 0, n);
  return row_major(used);
}

Tensor chwn_conv(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  const char* op = "chwn_conv";
  check_map(op, "x", x, x);
  check_map(op, "weight", weight, x);
  FASTCL_CHECK(weight.size(1) == x.size(0), op, ": weight has ", weight.size(1), " channels but x has ", x.size(0));
  const Geometry g = geometry(op, x.size(0), weight.size(0), x.size(3), {x.size(1), x.size(2)},
                              {weight.size(2), weight.size(3)}, stride, padding);
  return product(true, g, x, weight);
}

Tensor chwn_conv_input(const Tensor& y, const Tensor& weight, int64_t stride, int64_t padding, int64_t height,
                       int64_t width) {
  const char* op = "chwn_conv_input";
  check_map(op, "y", y, y);
  check_map(op, "weight", weight, y);
  const Geometry g = geometry(op, weight.size(1), weight.size(0), y.size(3), {height, width},
                              {weight.size(2), weight.size(3)}, stride, padding);
  check_y(op, "y", y, g);
  return product(false, g, y, weight);
}

Tensor chwn_conv_weight(const Tensor& y, const Tensor& x, int64_t stride, int64_t padding, int64_t height,
                        int64_t width) {
  const char* op = "chwn_conv_weight";
  check_map(op, "y", y, x);
  check_map(op, "x", x, x);
  Geometry g = geometry(op, x.size(0), y.size(0), x.size(3), {x.size(1), x.size(2)}, {height, width}, stride, padding);
  check_y(op, "y", y, g);
  const Tensor wide_y = filled(y), wide_x = filled(x);
  g.n = wide_x.size(3);
  Tensor weight = fresh({g.outputs, g.channels, height, width}, x.scalar_type());
  dispatch(x, [&](auto type) {
    using T = decltype(type);
    correlate(g, static_cast<const T*>(wide_y.const_data_ptr()), static_cast<const T*>(wide_x.const_data_ptr()),
              static_cast<T*>(weight.mutable_data_ptr()));
  });
  return weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("chwn_conv", TORCH_BOX(&chwn_conv));
  m.impl("chwn_conv_input", TORCH_BOX(&chwn_conv_input));
  m.impl("chwn_conv_weight", TORCH_BOX(&chwn_conv_weight));
}

}  // namespace fastcl

// Log densities of components whose covariance is diagonal, by samples as their rows lie: the components are side by
// side in a register, a number of x goes to all of them, and neither x nor the result is transposed (a tenth of the
// time).
#pragma once
#include <type_traits>

#include "../common/lanes.h"
#include "../common/transpose.h"
#include "blocks.h"
#include "deviations.h"

namespace fastcl {

// Of a near component y is taken as x inverse - mu inverse, two operations a number instead of three. That rounds mu
// inverse, by at most kNear units of the last place of 1; x and mu count from 0, or from the components' middle.
constexpr double kNear = 32;

constexpr int kFew = 4;  // components taken by features

// Lines of memory that are wanted soon, one a feature: waited for, they took a quarter of the time; fetched several at
// a time, a tenth.
struct Ahead {
  const char* at;
  int64_t step;
};

// out[s][i] = constant[i] - sum_j y^2 / 2, y = (x[s][j] - at[j][i]) inverse[j][i], or near: x[s][j] inverse[j][i] -
// at[j][i]. Of parameters [j][at, inverse][i] so many registers' components, of which the first `used` are written.
template <class T, bool several, int vectors, bool near>
struct ScaledSquares {
  template <int bytes>
  struct Of {
    static constexpr int kSamples = !several ? 1 : bytes == 64 ? 12 : 4;  // sums in 24 of 32 registers, 8 of 16
    static constexpr int kWidth = bytes / sizeof(T);
    using Vector = typename Lanes<T, kWidth>::Vector;

    template <int size>  // so many numbers, or not, and then by halves
    static FASTCL_HD void copy(T* to, const T* from, int64_t n) {
      if ((n & size) != 0) std::memcpy(to, from, size * sizeof(T));
      if constexpr (size > 1) copy<size / 2>(to + (n & size), from + (n & size), n);
    }
    static FASTCL_HD void run(T* out, int64_t ldo, const T* x, int64_t ldx, int64_t tiles, const T* parameters,
                              const T* constant, int64_t features, int64_t used, Ahead ahead) {
      FASTCL_ROLLED
      for (int64_t t = 0; t < tiles; ++t, out += kSamples * ldo, x += kSamples * ldx)
        ahead = tile(out, ldo, x, ldx, parameters, constant, features, used, ahead);
    }
    static FASTCL_HD Ahead tile(T* out, int64_t ldo, const T* x, int64_t ldx, const T* parameters, const T* constant,
                                int64_t features, int64_t used, Ahead ahead) {
      constexpr int kApart = 3;  // rows from one pointer, which an address can reach
      constexpr int kPointers = (kSamples + kApart - 1) / kApart;
      const T* rows[kPointers];
      for (int p = 0; p < kPointers; ++p) rows[p] = x + p * kApart * ldx;
      Vector sums[kSamples][vectors] = {};
      int64_t j = 0;
      do {  // there is one: asked first, gcc would keep the sums in memory too
        prefetch_later(ahead.at);
        ahead.at += ahead.step;
        Vector at[vectors], inverse[vectors];
        for (int v = 0; v < vectors; ++v) {
          at[v] = *reinterpret_cast<const Vector*>(parameters + v * kWidth);
          inverse[v] = *reinterpret_cast<const Vector*>(parameters + (vectors + v) * kWidth);
        }
        parameters += 2 * vectors * kWidth;
        for (int s = 0; s < kSamples; ++s) {
          const T value = rows[s / kApart][s % kApart * ldx];
          for (int v = 0; v < vectors; ++v) {
            const Vector y = near ? inverse[v] * value - at[v] : (at[v] - value) * inverse[v];
            sums[s][v] += y * y;
          }
        }
        for (int p = 0; p < kPointers; ++p) ++rows[p];
      } while (++j < features);
      Vector constants[vectors];
      for (int v = 0; v < vectors; ++v) constants[v] = *reinterpret_cast<const Vector*>(constant + v * kWidth);
      if (used >= vectors * kWidth) {
        for (int s = 0; s < kSamples; ++s)
          for (int v = 0; v < vectors; ++v)
            *reinterpret_cast<Vector*>(out + s * ldo + v * kWidth) = constants[v] - sums[s][v] * T(0.5);
        return ahead;
      }
      T logs[kSamples][vectors * kWidth];
      for (int s = 0; s < kSamples; ++s)
        for (int v = 0; v < vectors; ++v)
          *reinterpret_cast<Vector*>(logs[s] + v * kWidth) = constants[v] - sums[s][v] * T(0.5);
      FASTCL_ROLLED
      for (int s = 0; s < kSamples; ++s) copy<vectors * kWidth / 2>(out + s * ldo, logs[s], used);
      return ahead;
    }
  };
};

#ifdef FASTCL_X86
// The sums of sixteen registers, in order.
FASTCL_AVX512 inline __m512 sums_of(__m512 (&r)[16]) {
  for (int i = 0; i < 8; ++i)
    r[i] = _mm512_add_ps(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    r[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int size = 2; size > 0; size /= 2)
    for (int i = 0; i < size; ++i)
      r[i] = _mm512_add_ps(_mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0x88),
                           _mm512_shuffle_f32x4(r[2 * i], r[2 * i + 1], 0xdd));
  return r[0];
}

// The same of four components and as many samples, or one, the features side by side: what is left over of registers of
// sixteen components takes as much time as it has components, not as a register has. at and inverse [component][j],
// constant [kFew] however many are used.
template <bool near, int samples>
FASTCL_AVX512 inline void few_scaled_squares(float* out, int64_t ldo, const float* x, int64_t ldx, const float* at,
                                             const float* inverse, const float* constant, int64_t features,
                                             int64_t used, int64_t ahead) {
  __m512 sums[kFew * kFew] = {};
  int64_t j = 0;
  do {  // there is one: asked first, gcc would keep the sums in memory too
    const __mmask16 there =
        static_cast<__mmask16>(_bzhi_u32(0xffff, static_cast<unsigned>(std::min<int64_t>(16, features - j))));
    __m512 value[samples];
    for (int s = 0; s < samples; ++s) {
      prefetch_later(x + s * ldx + j + ahead);
      value[s] = _mm512_maskz_loadu_ps(there, x + s * ldx + j);
    }
    for (int c = 0; c < kFew; ++c) {
      const __m512 a = _mm512_maskz_loadu_ps(there, at + c * features + j);
      const __m512 scale = _mm512_maskz_loadu_ps(there, inverse + c * features + j);
      for (int s = 0; s < samples; ++s) {
        const __m512 y = near ? _mm512_fmsub_ps(value[s], scale, a) : _mm512_mul_ps(_mm512_sub_ps(value[s], a), scale);
        sums[s * kFew + c] = _mm512_fmadd_ps(y, y, sums[s * kFew + c]);
      }
    }
    j += 16;
  } while (j < features);
  const __m512 constants = _mm512_broadcast_f32x4(_mm_loadu_ps(constant));
  float logs[kFew * kFew];
  _mm512_storeu_ps(logs, _mm512_fnmadd_ps(sums_of(sums), _mm512_set1_ps(0.5f), constants));
  FASTCL_ROLLED
  for (int s = 0; s < samples; ++s)
    _mm_mask_storeu_ps(out + s * ldo, static_cast<__mmask8>((1 << used) - 1), _mm_loadu_ps(logs + s * kFew));
}
#endif

template <class T>
struct Nearness {  // scaled[i] = (mu[i] - middle[i]) inverse[i]; whether all are near, which NaN is not
  static FASTCL_HD bool run(T* FASTCL_RESTRICT scaled, const T* FASTCL_RESTRICT mu, const T* FASTCL_RESTRICT middle,
                            const T* FASTCL_RESTRICT inverse, int64_t n) {
    int64_t far = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double y = (double(mu[i]) - double(middle[i])) * double(inverse[i]);
      far += !(abs(y) <= kNear);
      scaled[i] = static_cast<T>(y);
    }
    return far == 0;
  }
};

template <class T, class In>
struct Less {  // to[s][j] = x[s][j] - minus[j]
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const In* FASTCL_RESTRICT x, const T* FASTCL_RESTRICT minus,
                            int64_t samples, int64_t features) {
    for (int64_t s = 0; s < samples; ++s)
      for (int64_t j = 0; j < features; ++j) to[s * features + j] = load(x + s * features + j) - minus[j];
  }
};

template <class In>
class DiagonalDensity {
  using T = arithmetic_t<In>;
  static constexpr int64_t kBlock = 96;  // samples at a time, a multiple of those of a tile

 public:
  const int64_t components, features;

  DiagonalDensity(const char* op, const Tensor& means, const Tensor& trils, Covariance covariance)
      : components(means.size(0)),
        features(means.size(1)),
        tile_(isa() == Isa::avx512 ? 12 : 4),
        lanes_(vector_bytes() / static_cast<int64_t>(sizeof(T))),
        mean_(new T[padded() * features]()),
        inverse_(new T[padded() * features]()),
        constant_(new T[padded()]()),
        middle_(new T[features]()),
        near_(padded(), 1) {
    const In* mu = static_cast<const In*>(means.const_data_ptr());
    const In* l = static_cast<const In*>(trils.const_data_ptr());
    std::vector<char> good(components, 1);
    par_for(0, components, std::max<int64_t>(1, 32768 / features), [&](int64_t first, int64_t last) {
      std::vector<In> same(covariance == Covariance::spherical ? features : 0);
      for (int64_t k = first; k < last; ++k) {
        for (int64_t i = 0; i < features; ++i) mean_[k * features + i] = load(mu + k * features + i);
        if (!same.empty()) std::fill(same.begin(), same.end(), l[k]);
        const Deviations found =
            simd<Invert<T, In>>(inverse_.get() + k * features, same.empty() ? l + k * features : same.data(), features);
        good[k] = found.good;
        constant_[k] = static_cast<T>(log_constant(found.log, features));
      }
    });
    check_deviations(op, good);
    find_near();
    pack();
  }

  // body(logs, begin, samples) with the log densities of each block: [samples][components], in `out` where that can
  // hold them, or [components][samples]. To `out`, a row of components for each of x, body will write.
  template <bool by_component, class F>
  void for_each(const In* x, int64_t n, In* out, const F& body) const {
    constexpr bool in_place = std::is_same_v<In, T> && !by_component;
#ifdef FASTCL_SMALL_GRAIN
    constexpr int64_t kWork = 1;  // the tests' few blocks go to several threads too
#else
    constexpr int64_t kWork = 131072;
#endif
    const int64_t at_once = std::max<int64_t>(1, kWork / (kBlock * components * features));
    par_tasks(ceil_div(n, kBlock), at_once, [&](Tasks::Share& share) {
      // scratch memory is read again in whole registers
      const int64_t row = by_component ? ceil_div(components, lanes_) * lanes_ : components;
      const bool converted = !std::is_same_v<In, T> && (any_far_ || !shifted_);
      const Aligned<T> plain = aligned<T>(converted ? kBlock * features : 0);
      const Aligned<T> less = aligned<T>(shifted_ ? kBlock * features : 0);
      const Aligned<T> logs = aligned<T>(in_place ? 0 : kBlock * row);
      const Aligned<T> turned = aligned<T>(by_component ? kBlock * row : 0);
      const std::unique_ptr<T[]> nothing(new T[features]());
      for (int64_t b = share.take(); b >= 0; b = share.take()) {
        const int64_t begin = b * kBlock, samples = std::min(kBlock, n - begin);
        const In* from = x + begin * features;
        const T *rows = nullptr, *near_rows = less.get();
        if constexpr (std::is_same_v<In, T>) {
          rows = from;
        } else if (converted) {
          simd<Less<T, In>>(plain.get(), from, static_cast<const T*>(nothing.get()), samples, features);
          rows = plain.get();
        }
        if (shifted_)
          simd<Less<T, In>>(less.get(), from, static_cast<const T*>(middle_.get()), samples, features);
        else
          near_rows = rows;
        T* to = logs.get();
        if constexpr (in_place) to = out + begin * components;
        const int64_t after = std::min(n, begin + kBlock);
        const Ahead next = {reinterpret_cast<const char*>(x + after * features), 0};
        const Ahead written = {reinterpret_cast<const char*>(out + (by_component ? begin : after) * components), 0};
        block(to, row, rows, near_rows, samples, next, written);
        if (by_component) {
          const int64_t columns = std::min(row, ceil_div(components, 4) * 4);  // in quarters of a register at least
          transpose(turned.get(), samples, static_cast<const T*>(to), row, samples, columns);
          to = turned.get();
        }
        body(to, begin, samples);
      }
    });
  }

 private:
  int64_t padded() const { return ceil_div(components, 2 * lanes_) * 2 * lanes_; }

  // Components in whole registers, the last perhaps filled up; a few that are left are taken by features instead.
  int64_t in_registers() const {
    const int64_t rest = components % lanes_;
    return std::is_same_v<T, float> && isa() == Isa::avx512 && rest <= kFew ? components - rest : components;
  }

  void find_near() {
    std::vector<T> scaled(components * features), from_middle;
    std::vector<char> near_middle(near_);
    const auto count_near = [&](std::vector<T>& y, std::vector<char>& near) {
      par_for(0, components, std::max<int64_t>(1, 262144 / features), [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k)
          near[k] = simd<Nearness<T>>(y.data() + k * features, static_cast<const T*>(mean_.get() + k * features),
                                      static_cast<const T*>(middle_.get()),
                                      static_cast<const T*>(inverse_.get() + k * features), features);
      });
      return std::count(near.begin(), near.end(), 1);
    };
    const auto near_zero = count_near(scaled, near_);
    if (near_zero < padded()) {
      std::vector<double> sum(features, 0);
      for (int64_t k = 0; k < components; ++k)
        for (int64_t i = 0; i < features; ++i) sum[i] += mean_[k * features + i];
      for (int64_t i = 0; i < features; ++i) middle_[i] = static_cast<T>(sum[i] / double(components));
      from_middle.resize(components * features);
      shifted_ = count_near(from_middle, near_middle) > near_zero;
      if (shifted_) near_.swap(near_middle), scaled.swap(from_middle);
    }
    // those that are taken at once are near together
    const int64_t whole = in_registers();
    for (int64_t k = 0; k < components;) {
      const int64_t count = k < whole ? std::min(2 * lanes_, whole - k) : std::min<int64_t>(kFew, components - k);
      const bool all = std::count(near_.begin() + k, near_.begin() + k + count, 1) == count;
      std::fill_n(near_.begin() + k, count, all);
      any_far_ = any_far_ || !all;
      if (all) std::copy_n(scaled.begin() + k * features, count * features, mean_.get() + k * features);
      k += count;
    }
  }

  void pack() {  // [components / (2 lanes)][feature][at, inverse][2 lanes], the last of as many registers as are left
    const int64_t registers = ceil_div(in_registers(), lanes_);
    packed_ = aligned<T>(registers * 2 * lanes_ * features);
    for (int64_t r = 0; r < registers;) {
      const int64_t vectors = std::min<int64_t>(2, registers - r), width = vectors * lanes_;
      T* to = packed_.get() + r * 2 * lanes_ * features;
      transpose(to, 2 * width, static_cast<const T*>(mean_.get() + r * lanes_ * features), features, width, features);
      transpose(to + width, 2 * width, static_cast<const T*>(inverse_.get() + r * lanes_ * features), features, width,
                features);
      r += vectors;
    }
  }

  // The log densities of a block's samples. Meanwhile memory of the next block is fetched: what is read there, by the
  // first components, and what is written.
  void block(T* out, int64_t ldo, const T* x, const T* near_x, int64_t samples, Ahead read, Ahead written) const {
    const int64_t whole = in_registers(), groups = ceil_div(whole, 2 * lanes_);
    read.step = tile_ * static_cast<int64_t>(sizeof(In));
    written.step =
        groups < 2 ? 0 : ceil_div(tile_ * components * static_cast<int64_t>(sizeof(In)), (groups - 1) * features);
    for (int64_t k = 0; k < whole; k += 2 * lanes_) {
      const Ahead ahead = k == 0 ? read : written;
      if (k > 0) written.at += written.step * features * (samples / tile_);
      if (whole - k > lanes_)
        near_[k] ? some<2, true>(out, ldo, near_x, k, samples, ahead) : some<2, false>(out, ldo, x, k, samples, ahead);
      else
        near_[k] ? some<1, true>(out, ldo, near_x, k, samples, ahead) : some<1, false>(out, ldo, x, k, samples, ahead);
    }
#ifdef FASTCL_X86
    if constexpr (std::is_same_v<T, float>)
      for (int64_t k = whole; k < components; k += kFew)
        near_[k] ? few<true>(out, ldo, near_x, k, samples) : few<false>(out, ldo, x, k, samples);
#endif
  }

  template <int vectors, bool is_near>
  void some(T* out, int64_t ldo, const T* x, int64_t k, int64_t samples, Ahead ahead) const {
    const int64_t tiles = samples / tile_, rest = samples % tile_;
    const auto run = [&](auto several, int64_t first, int64_t count) {
      simd_of_width<ScaledSquares<T, several.value, vectors, is_near>::template Of>(
          out + first * ldo + k, ldo, x + first * features, features, count,
          static_cast<const T*>(packed_.get() + k * 2 * features), static_cast<const T*>(constant_.get() + k), features,
          ldo - k, ahead);
    };
    if (tiles > 0) run(std::true_type{}, 0, tiles);
    if (tiles > 0 && rest > 0) run(std::true_type{}, samples - tile_, 1);  // some of them again
    if (tiles == 0) run(std::false_type{}, 0, rest);
  }

#ifdef FASTCL_X86
  template <bool is_near>
  void few(float* out, int64_t ldo, const float* x, int64_t k, int64_t samples) const {
    const int64_t used = std::min<int64_t>(kFew, ldo - k);
    const int64_t ahead = k == 0 && std::is_same_v<In, T> && !shifted_ ? kBlock * features : 0;  // nothing else fetches
    const auto run = [&](auto count, int64_t s) {
      few_scaled_squares<is_near, count.value>(out + s * ldo + k, ldo, x + s * features, features,
                                               mean_.get() + k * features, inverse_.get() + k * features,
                                               constant_.get() + k, features, used, ahead);
    };
    int64_t s = 0;
    for (; s + kFew <= samples; s += kFew) run(std::integral_constant<int, kFew>{}, s);
    for (; s < samples; ++s) run(std::integral_constant<int, 1>{}, s);
  }
#endif

  const int64_t tile_, lanes_;
  std::unique_ptr<T[]> mean_, inverse_, constant_, middle_;  // of a near component mean_ is (mu - middle) inverse
  std::vector<char> near_;
  bool shifted_ = false;  // near ones count from the middle, not from 0
  bool any_far_ = false;
  Aligned<T> packed_;
};

}  // namespace fastcl

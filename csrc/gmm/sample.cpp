// gmm_sample: z = mu_k + L_k eps. Samples are grouped by component, so that L eps is a product of tiles; eps is a
// function of the key, the sample's number and the feature alone, so that nothing else decides a sample's value.
#include "../common/philox.h"
#include "blocks.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "gmm_sample";

constexpr int64_t kWidest = 64;  // samples of a block, at most

// Four features' normals of a block of samples: counter (feature / 4, sample's low word, 0, its high word). They come
// as rows of samples, [4][width], or as one sample's four side by side, [width][4].
template <class T, bool side_by_side>
struct Normals {
  static FASTCL_HD void run(T* FASTCL_RESTRICT eps, const uint32_t* FASTCL_RESTRICT low,
                            const uint32_t* FASTCL_RESTRICT high, int64_t quad, int64_t width, uint32_t key0,
                            uint32_t key1, PhiloxWords random) {
    alignas(64) uint32_t words[4][kWidest];
    random(words[0], kWidest, static_cast<uint32_t>(quad), low, high, width, key0, key1);
    if constexpr (side_by_side) {
      for (int64_t s = 0; s < width; ++s) {
        const Pair<T> a = box_muller<T>(words[0][s], words[1][s]), b = box_muller<T>(words[2][s], words[3][s]);
        eps[4 * s] = a.first;
        eps[4 * s + 1] = a.second;
        eps[4 * s + 2] = b.first;
        eps[4 * s + 3] = b.second;
      }
    } else {
      for (int half = 0; half < 2; ++half)
        for (int64_t s = 0; s < width; ++s) {
          const Pair<T> pair = box_muller<T>(words[2 * half][s], words[2 * half + 1][s]);
          eps[2 * half * width + s] = pair.first;
          eps[(2 * half + 1) * width + s] = pair.second;
        }
    }
  }
};

template <class T>
struct SideBySide {  // [4 quads][width] -> [quads][width][4]
  static FASTCL_HD void run(T* FASTCL_RESTRICT to, const T* FASTCL_RESTRICT from, int64_t quads, int64_t width) {
    for (int64_t quad = 0; quad < quads; ++quad, to += 4 * width, from += 4 * width)
      for (int64_t s = 0; s < width; ++s) {
        to[4 * s] = from[s];
        to[4 * s + 1] = from[width + s];
        to[4 * s + 2] = from[2 * width + s];
        to[4 * s + 3] = from[3 * width + s];
      }
  }
};

// out[rows[s], j] = mu[j] + sd[j] z[j / 4][s][j % 4]; without sd where z is L eps already.
template <class T, class Out, bool scaled>
struct StoreRows {
  static FASTCL_HD void run(Out* out, const T* FASTCL_RESTRICT z, const T* FASTCL_RESTRICT mean,
                            const T* FASTCL_RESTRICT deviation, const int64_t* rows, int64_t samples, int64_t width,
                            int64_t features) {
    for (int64_t s = 0; s < samples; ++s) {
      Out* FASTCL_RESTRICT to = out + rows[s] * features;
      const T* FASTCL_RESTRICT from = z + 4 * s;
      const auto one = [&](int64_t j, int64_t c) FASTCL_LAMBDA_HD {
        store(to + j + c, mean[j + c] + (scaled ? deviation[j + c] * from[c] : from[c]));
      };
      int64_t j = 0;
      for (; j + 4 <= features; j += 4, from += 4 * width)
        for (int64_t c = 0; c < 4; ++c) one(j, c);
      for (int64_t c = 0; j + c < features; ++c) one(j, c);
    }
  }
};

template <class In>
void sample(In* out, const Grouped& groups, const Tensor& means, const Tensor& trils, Covariance covariance,
            uint64_t key) {
  using T = arithmetic_t<In>;
  const int64_t components = means.size(0), features = means.size(1), quads = ceil_div(features, 4);
  const TileChoice<T> tile = choose_tile<T>();
  const In* mu = static_cast<const In*>(means.const_data_ptr());
  const In* l = static_cast<const In*>(trils.const_data_ptr());
  const bool full = covariance == Covariance::full, diagonal = covariance == Covariance::diagonal;
  const int64_t width = full ? tile.nr : 48;
  std::unique_ptr<T[]> mean(new T[components * features]), deviation(new T[full ? 0 : components * features]);
  Factors<T> factors(full ? components : 0, features, tile.mr);
  par_for(0, components, std::max<int64_t>(1, 16384 / (full ? features * features : features)),
          [&](int64_t first, int64_t last) {
            for (int64_t k = first; k < last; ++k) {
              if (groups.begin[k] == groups.begin[k + 1]) continue;
              for (int64_t i = 0; i < features; ++i) {
                mean[k * features + i] = load(mu + k * features + i);
                if (!full) deviation[k * features + i] = load(diagonal ? l + k * features + i : l + k);
                for (int64_t j = 0; full && j <= i; ++j)
                  factors.set(k, i, j, load(l + (k * features + i) * features + j));
              }
            }
          });

  struct Piece {
    int64_t component, begin, samples;
  };
  std::vector<Piece> pieces;
  for (int64_t k = 0; k < components; ++k)
    for (int64_t at = groups.begin[k]; at < groups.begin[k + 1]; at += width)
      pieces.push_back({k, at, std::min(width, groups.begin[k + 1] - at)});
  const int64_t height = std::max(4 * quads, full ? factors.count * tile.mr : 0);
  const int64_t row_lines = ceil_div(features * static_cast<int64_t>(sizeof(In)), 64);  // of the cache, about
  const PhiloxWords random = philox_words();
  const int64_t grain = std::max<int64_t>(1, 65536 / (width * features * (full ? 1 + features / 32 : 1)));
  par_for(0, static_cast<int64_t>(pieces.size()), grain, [&](int64_t first, int64_t last) {
    const Aligned<T> eps = aligned<T>(4 * quads * width), z = aligned<T>(full ? height * width : 0);
    alignas(64) uint32_t low[kWidest], high[kWidest];
    const uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
    for (int64_t p = first; p < last; ++p) {
      const Piece& piece = pieces[p];
      const int64_t* rows = groups.order.data() + piece.begin;
      for (int64_t s = 0; s < width; ++s) {
        const uint64_t n = static_cast<uint64_t>(rows[std::min(s, piece.samples - 1)]);
        low[s] = static_cast<uint32_t>(n);
        high[s] = static_cast<uint32_t>(n >> 32);
      }
      // A component's rows lie apart in memory: their lines come while the numbers are made, a few at a time, since a
      // processor waits with more than a dozen under way (together they were a quarter of the time).
      const uint32_t *lows = low, *highs = high;
      int64_t line = 0, row = 0;
      for (int64_t quad = 0; quad < quads; ++quad) {
        for (int64_t due = piece.samples * row_lines * (quad + 1) / quads; row * row_lines + line < due;) {
          prefetch(reinterpret_cast<const char*>(out + rows[row] * features) + 64 * line);
          if (++line == row_lines) line = 0, ++row;
        }
        T* to = eps.get() + 4 * width * quad;
        if (full)
          simd<Normals<T, false>>(to, lows, highs, quad, width, key0, key1, random);
        else
          simd<Normals<T, true>>(to, lows, highs, quad, width, key0, key1, random);
      }
      const T* m = mean.get() + piece.component * features;
      if (!full) {
        simd<StoreRows<T, In, true>>(out, eps.get(), m, deviation.get() + piece.component * features, rows,
                                     piece.samples, width, features);
        continue;
      }
      tile.triangle(factors.panel(piece.component, 0), features, eps.get(), z.get());
      simd<SideBySide<T>>(eps.get(), z.get(), quads, width);
      simd<StoreRows<T, In, false>>(out, eps.get(), m, static_cast<const T*>(nullptr), rows, piece.samples, width,
                                    features);
    }
  });
}

Tensor gmm_sample(const Tensor& labels, const Tensor& means, const Tensor& scale_trils, const Tensor& key) {
  const Covariance covariance = covariance_of(kOp, means, scale_trils);
  FASTCL_CHECK(key.is_cpu() && key.scalar_type() == ScalarType::Long && key.numel() == 1, kOp,
               ": key must be one int64 number on the CPU");
  const Grouped groups(kOp, labels, means.size(0));
  const Tensor mu = row_major(means), l = row_major(scale_trils);
  Tensor out = fresh({labels.numel(), means.size(1)}, means.scalar_type());
  const uint64_t seed = static_cast<uint64_t>(*static_cast<const int64_t*>(key.const_data_ptr()));
  dispatch_float(means.scalar_type(), kOp, "means", [&](auto type) {
    using In = decltype(type);
    sample<In>(static_cast<In*>(out.mutable_data_ptr()), groups, mu, l, covariance, seed);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) { m.impl("gmm_sample", TORCH_BOX(&gmm_sample)); }

}  // namespace fastcl

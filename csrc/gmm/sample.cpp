// gmm_sample: z = mu_k + L_k eps. Samples are grouped by component, so that L eps is a product of tiles; eps is a
// function of the key, the sample's number and the feature alone, so that nothing else decides a sample's value.
#include "../common/philox.h"
#include "blocks.h"
#include "math.h"

namespace fastcl {
namespace {

constexpr const char* kOp = "gmm_sample";

constexpr int64_t kWidest = 64;       // samples of a block, at most
constexpr int64_t kKept = 512 << 10;  // bytes of a thread's cache

// Four features' normals of a block of samples: counter (feature / 4, sample's low word, 0, its high word). They come
// as rows of samples, [4][width], or as one sample's four side by side, [width][4].
template <class T, bool side_by_side>
struct Normals {
  template <int bytes>
  struct Of {  // width is a multiple of a vector's numbers: no remainder, and no overlap to test for
    static FASTCL_HD void run(T* FASTCL_RESTRICT eps, const uint32_t* FASTCL_RESTRICT low, uint32_t high, int64_t quad,
                              int64_t width, const PhiloxKeys* keys, PhiloxWords random) {
      constexpr int64_t lanes = bytes / sizeof(T);
      alignas(64) uint32_t words[4][kWidest];
      random(words[0], kWidest, static_cast<uint32_t>(quad), low, high, width, *keys);
      for (int64_t at = 0; at < width; at += lanes) {
        T z[4][lanes];
        for (int half = 0; half < 2; ++half)
          for (int64_t s = 0; s < lanes; ++s) {
            const Pair<T> pair = box_muller<T>(words[2 * half][at + s], words[2 * half + 1][at + s]);
            z[2 * half][s] = pair.first;
            z[2 * half + 1][s] = pair.second;
          }
        if constexpr (side_by_side)
          for (int64_t s = 0; s < lanes; ++s)
            for (int i = 0; i < 4; ++i) eps[4 * (at + s) + i] = z[i][s];
        else
          for (int i = 0; i < 4; ++i)
            for (int64_t s = 0; s < lanes; ++s) eps[i * width + at + s] = z[i][s];
      }
    }
  };
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

// A component's rows lie apart in memory: their lines come while the numbers are made, a few at a time, since a
// processor waits with more than a dozen under way (together they were a quarter of the time).
struct Lines {
  const char* out;
  const int64_t* rows;
  int64_t samples, row_bytes, row = 0, byte = 0;
  int64_t count() const { return samples * ceil_div(row_bytes, 64); }
  void fetch(int64_t lines) {
    for (; lines > 0 && row < samples; --lines) {
      prefetch(out + rows[row] * row_bytes + byte);
      if ((byte += 64) >= row_bytes) byte = 0, ++row;
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
  // Components in turn, a piece of each: what is written at a time lies close together. Unless their factors would not
  // stay in the cache meanwhile: then one component after the other.
  const bool in_turn = components * features * (full ? features : 2) * static_cast<int64_t>(sizeof(T)) <= kKept;
  std::vector<int64_t> left, next(groups.begin);
  for (int64_t k = 0; k < components; ++k)
    if (next[k] < groups.begin[k + 1]) left.push_back(k);
  while (!left.empty()) {
    size_t unfinished = 0;
    for (const int64_t k : left) {
      const int64_t end = groups.begin[k + 1];
      do {
        int64_t to = std::min(next[k] + width, end);
        while ((groups.order[next[k]] ^ groups.order[to - 1]) >> 32) --to;  // one high word in a piece
        pieces.push_back({k, next[k], to - next[k]});
        next[k] = to;
      } while (!in_turn && next[k] < end);
      if (next[k] < end) left[unfinished++] = k;
    }
    left.resize(unfinished);
  }
  const int64_t height = std::max(4 * quads, full ? factors.count * tile.mr : 0);
  const PhiloxWords random = philox_words();
  const int64_t grain = std::max<int64_t>(1, 65536 / (width * features * (full ? 1 + features / 32 : 1)));
  par_tasks(static_cast<int64_t>(pieces.size()), grain, [&](Tasks::Share& share) {
    const Aligned<T> eps = aligned<T>(4 * quads * width), z = aligned<T>(full ? height * width : 0);
    alignas(64) uint32_t low[kWidest];
    const PhiloxKeys keys(key);
    for (int64_t p; (p = share.take()) >= 0;) {
      const Piece& piece = pieces[p];
      const int64_t* rows = groups.order.get() + piece.begin;
      for (int64_t s = 0; s < piece.samples; ++s) low[s] = static_cast<uint32_t>(rows[s]);
      for (int64_t s = piece.samples; s < width; ++s) low[s] = low[0];
      const uint32_t high = static_cast<uint32_t>(rows[0] >> 32), *lows = low;
      Lines ahead{reinterpret_cast<const char*>(out), rows, piece.samples, features * static_cast<int64_t>(sizeof(In))};
      const int64_t lines = ceil_div(ahead.count(), quads);
      for (int64_t quad = 0; quad < quads; ++quad) {
        ahead.fetch(lines);
        T* to = eps.get() + 4 * width * quad;
        if (full)
          simd_of_width<Normals<T, false>::template Of>(to, lows, high, quad, width, &keys, random);
        else
          simd_of_width<Normals<T, true>::template Of>(to, lows, high, quad, width, &keys, random);
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

// Mixtures are worked on in blocks of samples that lie side by side, [features][width]: the right operand of the tile,
// whose width they have. A triangular factor is the left one, [rows / mr][feature][mr].
#pragma once
#include <memory>

#include "../common/cpu.h"
#include "../common/tile.h"

namespace fastcl {

enum class Covariance { full, diagonal, spherical };

// What [K, D, D], [K, D] or [K] says of the covariance, checked against means [K, D].
Covariance covariance_of(const char* op, const Tensor& means, const Tensor& scale_trils);
void check_means(const char* op, const Tensor& means);
void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, const char* rows_of, int64_t columns,
                  const char* columns_of, const Tensor& like, const char* like_name);

// Lower triangular factors as the tile's `triangle` wants them: [k][i / mr][j][i % mr], zero beyond D.
template <class T>
struct Factors {
  int64_t count, features, mr;
  std::unique_ptr<T[]> data;

  Factors(int64_t components, int64_t features_, int64_t mr_)
      : count(ceil_div(features_, mr_)),
        features(features_),
        mr(mr_),
        data(new T[components * count * features_ * mr_]()) {}
  T* panel(int64_t k, int64_t q) const { return data.get() + (k * count + q) * features * mr; }
  void set(int64_t k, int64_t i, int64_t j, T value) { panel(k, i / mr)[j * mr + i % mr] = value; }
};

// Samples in the order of their labels, each label's in their own order; begin[k] ... begin[k + 1] are label k's.
struct Grouped {
  std::unique_ptr<int64_t[]> order;
  std::vector<int64_t> begin;
  Grouped(const char* op, const Tensor& labels, int64_t components);
};

}  // namespace fastcl

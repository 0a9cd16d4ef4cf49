#include "blocks.h"

#include <utility>

namespace fastcl {
namespace {

#ifdef FASTCL_SMALL_GRAIN
constexpr int64_t kChunk = 128;
#else
constexpr int64_t kChunk = 16384;  // labels that a thread takes at once
#endif

}  // namespace

void check_means(const char* op, const Tensor& means) {
  FASTCL_CHECK(means.is_cpu(), op, ": means must be a CPU tensor");
  dispatch_float(means.scalar_type(), op, "means", [](auto) {});
  FASTCL_CHECK(means.dim() == 2 && means.size(0) > 0 && means.size(1) > 0, op,
               ": means must be [K, D] with at least one component and one feature");
}

Covariance covariance_of(const char* op, const Tensor& means, const Tensor& scale_trils) {
  check_means(op, means);
  const int64_t k = means.size(0), d = means.size(1), dim = scale_trils.dim();
  FASTCL_CHECK(scale_trils.is_cpu(), op, ": scale_trils must be a CPU tensor like means");
  check_same_dtype(scale_trils, means, op, "scale_trils", "means");
  bool good = dim >= 1 && dim <= 3 && scale_trils.size(0) == k;
  for (int64_t i = 1; good && i < dim; ++i) good = scale_trils.size(i) == d;
  FASTCL_CHECK(good, op, ": scale_trils must be [K, D, D], [K, D] or [K] with the K, D of means, ", k, " and ", d);
  return dim == 3 ? Covariance::full : dim == 2 ? Covariance::diagonal : Covariance::spherical;
}

void check_matrix(const char* op, const char* name, const Tensor& t, int64_t rows, const char* rows_of, int64_t columns,
                  const char* columns_of, const Tensor& like, const char* like_name) {
  FASTCL_CHECK(t.is_cpu(), op, ": ", name, " must be a CPU tensor like ", like_name);
  check_same_dtype(t, like, op, name, like_name);
  FASTCL_CHECK(t.dim() == 2 && (rows < 0 || t.size(0) == rows) && t.size(1) == columns, op, ": ", name, " must be [",
               rows_of, ", ", columns_of, "] with the sizes of ", like_name);
}

Grouped::Grouped(const char* op, const Tensor& labels, int64_t components) : begin(components + 1, 0) {
  FASTCL_CHECK(labels.is_cpu() && labels.scalar_type() == ScalarType::Long && labels.dim() == 1, op,
               ": labels must be an int64 CPU tensor [N]");
  const Tensor dense = row_major(labels);
  const int64_t* y = static_cast<const int64_t*>(dense.const_data_ptr());
  const int64_t n = dense.numel(), chunks = ceil_div(n, kChunk);
  // How many of each label every chunk has, then where its first of each goes.
  std::unique_ptr<int64_t[]> next(new int64_t[chunks * components]());
  std::vector<int64_t> bad(chunks, -1);
  const auto each = [&](const auto& f) {
    par_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) f(c, c * kChunk, std::min(n, (c + 1) * kChunk), &next[c * components]);
    });
  };
  each([&](int64_t chunk, int64_t from, int64_t to, int64_t* count) {
    for (int64_t i = from; i < to; ++i) {
      if (y[i] < 0 || y[i] >= components) {
        bad[chunk] = i;
        return;
      }
      ++count[y[i]];
    }
  });
  for (const int64_t i : bad)
    FASTCL_CHECK(i < 0, op, ": labels has ", y[i], " but must lie between 0 and ", components - 1);
  int64_t at = 0;
  for (int64_t k = 0; k < components; ++k) {
    begin[k] = at;
    for (int64_t c = 0; c < chunks; ++c) at += std::exchange(next[c * components + k], at);
  }
  begin[components] = at;
  order.reset(new int64_t[n]);
  each([&](int64_t, int64_t from, int64_t to, int64_t* to_of) {
    for (int64_t i = from; i < to; ++i) order[to_of[y[i]]++] = i;
  });
}

}  // namespace fastcl

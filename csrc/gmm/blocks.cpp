#include "blocks.h"

namespace fastcl {

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
  const int64_t n = dense.numel();
  for (int64_t i = 0; i < n; ++i) {
    FASTCL_CHECK(y[i] >= 0 && y[i] < components, op, ": labels has ", y[i], " but must lie between 0 and ",
                 components - 1);
    ++begin[y[i] + 1];
  }
  for (int64_t k = 0; k < components; ++k) begin[k + 1] += begin[k];
  order.resize(n);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < n; ++i) order[next[y[i]]++] = i;
}

}  // namespace fastcl

#include "masks.h"

namespace fastcl {
namespace {

bool all_in_unit_interval(const Tensor& t) {
  return dispatch_float(t.scalar_type(), "mask", "reserved", [&](auto type) {
    using M = decltype(type);
    const M* r = static_cast<const M*>(t.const_data_ptr());
    VirtualArray all;
    all.add(t.numel());
    std::vector<char> good(all.chunks(), 1);
    all.for_each([&](size_t, int64_t begin, int64_t end, int64_t chunk) {
      good[chunk] = simd<AllInUnitInterval<M>>(r + begin, end - begin);
    });
    return std::all_of(good.begin(), good.end(), [](char g) { return g != 0; });
  });
}

Tensor as_vector(const Tensor& t, bool wide) {
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  return row_major(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

}  // namespace

Mask::Mask(const Tensor& reserved, const Tensor* columns, const Tensor& weight, const char* op, Name name,
           Name weight_name)
    : data_(reserved), inner_(reserved), numel_(weight.numel()), wide_(weight.scalar_type() == ScalarType::Double) {
  FASTCL_CHECK(reserved.is_cpu(), op, ": ", name, " must be a CPU tensor like ", weight_name);
  if (numel_ == 0) return;
  if (columns != nullptr && columns->numel() > 0) {
    take_vectors(reserved, *columns, weight, op, name, weight_name);
    return;
  }
  const ScalarType dtype = reserved.scalar_type();
  if (dtype == ScalarType::Bool && reserved.dim() == 1 && reserved.numel() == 0) return;
  if (dtype == ScalarType::Byte) {
    FASTCL_CHECK(reserved.dim() == 1 && reserved.numel() == (numel_ + 7) / 8, op, ": ", name, " has ", reserved.numel(),
                 " bytes in ", reserved.dim(), " dimensions but packed bits for ", weight_name,
                 " must be one dimension of ", (numel_ + 7) / 8);
    data_ = row_major(reserved);
    view_.kind = MaskKind::packed;
  } else {
    FASTCL_CHECK(dtype == ScalarType::Bool || is_floating(dtype), op, ": ", name,
                 " must be bool, uint8 (packed bits), float32, float64, bfloat16 or float16");
    check_like(reserved, weight, op, name, weight_name);
    data_ = in_layout_of(reserved, weight);
    view_.kind = dtype == ScalarType::Bool       ? MaskKind::boolean
                 : dtype == ScalarType::Float    ? MaskKind::f32
                 : dtype == ScalarType::Double   ? MaskKind::f64
                 : dtype == ScalarType::BFloat16 ? MaskKind::bf16
                                                 : MaskKind::f16;
  }
  view_.data = data_.const_data_ptr();
}

void Mask::take_vectors(const Tensor& rows, const Tensor& columns, const Tensor& weight, const char* op, Name name,
                        Name weight_name) {
  FASTCL_CHECK(columns.is_cpu(), op, ": the columns of ", name, " must be a CPU tensor like ", weight_name);
  FASTCL_CHECK(is_floating(rows.scalar_type()) && is_floating(columns.scalar_type()), op, ": ", name,
               " and its columns must be float32, float64, bfloat16 or float16");
  FASTCL_CHECK(weight.dim() >= 2 && rows.dim() == 1 && columns.dim() == 1 && rows.numel() == weight.size(0) &&
                   columns.numel() == weight.size(1),
               op, ": ", name, " and its columns have ", rows.numel(), " and ", columns.numel(),
               " values but must be vectors with one for each index of dimensions 0 and 1 of ", weight_name);
  const int64_t numel = weight.numel();
  int64_t outer = -1;
  for (int64_t d = 1; d >= 0; --d)
    if (weight.size(d) == 1 ? d == 0 && outer < 0 : weight.stride(d) * weight.size(d) == numel) outer = d;
  view_.kind = MaskKind::vectors;
  const Tensor row_values = as_vector(rows, wide_), column_values = as_vector(columns, wide_);
  // Both, whole: in their minimum one hides what is wrong with the other. Short, so it costs nothing to look always.
  FASTCL_CHECK(all_in_unit_interval(row_values) && all_in_unit_interval(column_values), op, ": ", name,
               " has values outside [0, 1] or NaN");
  // Where neither dimension is outermost in memory (no layout that torch's modules make), one row is the whole weight.
  view_.row = outer < 0 ? numel : numel / weight.size(outer);
  inner_ = fresh({view_.row}, row_values.scalar_type());
  data_ = outer == 0   ? row_values
          : outer == 1 ? column_values
                       : torch::stable::fill_(fresh({1}, row_values.scalar_type()), 1.0);
  const auto place = [&](int64_t dim, int64_t k) {
    return weight.size(dim) == 1 ? 0 : k / weight.stride(dim) % weight.size(dim);
  };
  dispatch_float(row_values.scalar_type(), op, name, [&](auto type) {
    using A = decltype(type);
    const A* r = static_cast<const A*>(row_values.const_data_ptr());
    const A* c = static_cast<const A*>(column_values.const_data_ptr());
    A* to = static_cast<A*>(inner_.mutable_data_ptr());
    for (int64_t k = 0; k < view_.row; ++k) {
      const A of_row = outer == 0 ? A(1) : r[place(0, k)], of_column = outer == 1 ? A(1) : c[place(1, k)];
      to[k] = of_row < of_column ? of_row : of_column;
    }
  });
  view_.data = data_.const_data_ptr();
  view_.inner = inner_.const_data_ptr();
}

bool Mask::in_unit_interval() const {
  switch (view_.kind) {
    case MaskKind::none:
    case MaskKind::boolean:
    case MaskKind::packed:
      return true;
    case MaskKind::vectors:
      return all_in_unit_interval(data_) && all_in_unit_interval(inner_);
    default:
      return all_in_unit_interval(data_);
  }
}

}  // namespace fastcl

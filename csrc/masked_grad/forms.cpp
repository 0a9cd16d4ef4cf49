// Masks stored as bits or as two vectors: applying them, packing, unpacking.
#include "forms.h"

#include <deque>

#include "../common/masks.h"
#include "math.h"

namespace fastcl {
namespace {

void masked_grad_any_(Tensors grads, Tensors reserved, Tensors columns) {
  masked_grad_any("masked_grad_any_", std::move(grads), reserved, columns);
}

struct Pack {
  static FASTCL_HD void run(uint8_t* FASTCL_RESTRICT bytes, const uint8_t* FASTCL_RESTRICT r, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      uint32_t byte = 0;
      for (int j = 0; j < 8; ++j) byte |= uint32_t(r[i + j] != 0) << j;
      bytes[i / 8] = static_cast<uint8_t>(byte);
    }
    if (i == n) return;
    uint32_t byte = 0;
    for (int j = 0; i + j < n; ++j) byte |= uint32_t(r[i + j] != 0) << j;
    bytes[i / 8] = static_cast<uint8_t>(byte);
  }
};

struct Unpack {
  static FASTCL_HD void run(uint8_t* r, const uint8_t* bytes, int64_t n) {
    expand_bits(r, bytes, n,
                [](uint32_t word, uint32_t j) FASTCL_LAMBDA_HD { return static_cast<uint8_t>(word >> j & 1); });
  }
};

Tensor pack_mask(Tensor mask) {
  const char* op = "pack_mask";
  FASTCL_CHECK(mask.is_cpu() && mask.scalar_type() == ScalarType::Bool, op, ": mask must be a bool CPU tensor");
  mask = without_gaps(mask);
  Tensor packed = fresh({(mask.numel() + 7) / 8}, ScalarType::Byte);
  uint8_t* bytes = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const uint8_t* r = static_cast<const uint8_t*>(mask.const_data_ptr());
  for_elements(mask.numel(), [&](int64_t begin, int64_t n) { simd<Pack>(bytes + begin / 8, r + begin, n); });
  return packed;
}

Tensor unpack_mask(Tensor packed, Tensor like) {
  const char* op = "unpack_mask";
  FASTCL_CHECK(packed.is_cpu() && like.is_cpu(), op, ": packed and like must be CPU tensors");
  const int64_t bytes = (like.numel() + 7) / 8;
  FASTCL_CHECK(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.numel() == bytes, op,
               ": packed must be uint8 of one dimension with ", bytes, " bytes, for the ", like.numel(),
               " elements of like");
  packed = row_major(packed);
  like = without_gaps(like);
  Tensor mask = torch::stable::to(torch::stable::empty_like(like), ScalarType::Bool);
  uint8_t* r = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const uint8_t* b = static_cast<const uint8_t*>(packed.const_data_ptr());
  for_elements(like.numel(), [&](int64_t begin, int64_t n) { simd<Unpack>(r + begin, b + begin / 8, n); });
  return mask;
}

}  // namespace

void masked_grad_any(const char* op, Tensors grads, const Tensors& reserved, const Tensors& columns) {
  check_lengths(reserved.size(), grads.size(), op, "reserved", "grads");
  if (!columns.empty()) check_lengths(columns.size(), grads.size(), op, "columns", "grads");
  for (size_t i = 0; i < grads.size(); ++i) {
    check_output(grads[i], op, item("grads", i));
    dispatch_float(grads[i].scalar_type(), op, item("grads", i), [](auto) {});
  }
  check_distinct(grads, {&reserved, &columns}, op, "grads", {"reserved", "columns"});
  std::deque<Mask> masks;
  Tensors work;
  VirtualArray all;
  for (size_t i = 0; i < grads.size(); ++i) {
    work.push_back(without_gaps(grads[i]));
    const Mask& mask = masks.emplace_back(reserved[i], columns.empty() ? nullptr : &columns[i], work[i], op,
                                          item("reserved", i), item("grads", i));
    FASTCL_CHECK(mask.in_unit_interval(), op, ": ", item("reserved", i), " has values outside [0, 1] or NaN");
    all.add(work[i].numel());
  }
  all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    dispatch_float(work[t].scalar_type(), op, "grads", [&](auto type) {
      using T = decltype(type);
      simd<ShareGradient<T>>(static_cast<T*>(work[t].mutable_data_ptr()) + begin, masks[t].view(), begin, end - begin);
    });
  });
  for (size_t i = 0; i < grads.size(); ++i)
    if (!is_dense(grads[i])) torch::stable::copy_(grads[i], work[i]);
}

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("masked_grad_any_", TORCH_BOX(&masked_grad_any_));
  m.impl("pack_mask", TORCH_BOX(&pack_mask));
  m.impl("unpack_mask", TORCH_BOX(&unpack_mask));
}

}  // namespace fastcl

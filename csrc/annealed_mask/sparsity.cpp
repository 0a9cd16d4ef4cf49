// DGM's eq. (5) and HAT's regulariser: the share of the free units or weights that the masks use.
#include "../common/masks.h"
#include "math.h"

namespace fastcl {
namespace {

template <class T>
struct Sparsity {  // sums m (1 - r) and 1 - r
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(const T* FASTCL_RESTRICT m, MaskView reserved, double* used, double* free_total,
                            int64_t begin, int64_t n) {
    alignas(64) A free[kMaskBlock];
    double lane[kLanes] = {}, frees[kLanes] = {};
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t count = std::min(kMaskBlock, n - at);
      if (at == 0 || reserved.kind != MaskKind::none) free_shares(free, reserved, begin + at, count);
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes)
        for (int l = 0; l < kLanes; ++l) {
          lane[l] += load(m + at + i + l) * free[i + l];
          frees[l] += free[i + l];
        }
      for (; i < count; ++i) {
        lane[i % kLanes] += load(m + at + i) * free[i];
        frees[i % kLanes] += free[i];
      }
    }
    for (int l = 0; l < kLanes; ++l) {
      *used += lane[l];
      *free_total += frees[l];
    }
  }
};

template <class T>
struct SparsityBackward {
  using A = arithmetic_t<T>;
  static FASTCL_HD void run(T* FASTCL_RESTRICT gm, MaskView reserved, double factor, int64_t begin, int64_t n) {
    const A f = static_cast<A>(factor);
    alignas(64) A free[kMaskBlock];
    for (int64_t at = 0; at < n; at += kMaskBlock) {
      const int64_t count = std::min(kMaskBlock, n - at);
      if (at == 0 || reserved.kind != MaskKind::none) free_shares(free, reserved, begin + at, count);
      for (int64_t i = 0; i < count; ++i) store(gm + at + i, f * free[i]);
    }
  }
};

struct Problem {
  Tensors masks;
  std::vector<Mask> reserved;
  VirtualArray all;
  bool wide = false;

  Problem(const char* op, const Tensors& given, const Tensors& given_reserved) {
    if (!given_reserved.empty()) check_lengths(given_reserved.size(), given.size(), op, "reserved", "masks");
    for (size_t i = 0; i < given.size(); ++i) {
      FASTCL_CHECK(given[i].is_cpu(), op, ": ", item("masks", i), " must be a CPU tensor");
      dispatch_float(given[i].scalar_type(), op, item("masks", i), [](auto) {});
      wide |= given[i].scalar_type() == ScalarType::Double;
      masks.push_back(without_gaps(given[i]));
      all.add(masks[i].numel());
      if (given_reserved.empty()) {
        reserved.emplace_back();
        continue;
      }
      reserved.emplace_back(given_reserved[i], nullptr, masks[i], op, item("reserved", i), item("masks", i));
      FASTCL_CHECK(reserved[i].in_unit_interval(), op, ": ", item("reserved", i), " has values outside [0, 1] or NaN");
    }
  }

  // Summed chunk by chunk: the same for any number of threads.
  std::pair<double, double> sums() const {
    std::vector<double> used(all.chunks(), 0), free(all.chunks(), 0);
    all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t chunk) {
      dispatch_float(masks[t].scalar_type(), "mask_sparsity", "masks", [&](auto type) {
        using T = decltype(type);
        simd<Sparsity<T>>(static_cast<const T*>(masks[t].const_data_ptr()) + begin, reserved[t].view(), &used[chunk],
                          &free[chunk], begin, end - begin);
      });
    });
    double u = 0, f = 0;
    for (size_t c = 0; c < used.size(); ++c) {
      u += used[c];
      f += free[c];
    }
    return {u, f};
  }
};

Tensor mask_sparsity(Tensors masks, Tensors reserved) {
  const Problem problem("mask_sparsity", masks, reserved);
  const auto [used, free] = problem.sums();
  const double value = free > 0 ? used / free : 0;  // nothing free: nothing to regularise
  Tensor result = torch::stable::empty({}, problem.wide ? ScalarType::Double : ScalarType::Float);
  if (problem.wide)
    *static_cast<double*>(result.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(result.mutable_data_ptr()) = static_cast<float>(value);
  return result;
}

Tensors mask_sparsity_backward(Tensor grad, Tensors masks, Tensors reserved) {
  const char* op = "mask_sparsity_backward";
  const Problem problem(op, masks, reserved);
  FASTCL_CHECK(grad.is_cpu() && grad.numel() == 1, op, ": grad must be one number on the CPU");
  const double g = dispatch_float(grad.scalar_type(), op, "grad", [&](auto type) {
    using T = decltype(type);
    return static_cast<double>(load(static_cast<const T*>(grad.const_data_ptr())));
  });
  const double free = problem.sums().second;
  Tensors grads;
  for (const Tensor& m : problem.masks) grads.push_back(fresh_like(m));
  problem.all.for_each([&](size_t t, int64_t begin, int64_t end, int64_t) {
    dispatch_float(grads[t].scalar_type(), op, "masks", [&](auto type) {
      using T = decltype(type);
      simd<SparsityBackward<T>>(static_cast<T*>(grads[t].mutable_data_ptr()) + begin, problem.reserved[t].view(),
                                free > 0 ? g / free : 0, begin, end - begin);
    });
  });
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FASTCL_NS, CPU, m) {
  m.impl("mask_sparsity", TORCH_BOX(&mask_sparsity));
  m.impl("mask_sparsity_backward", TORCH_BOX(&mask_sparsity_backward));
}

}  // namespace fastcl

// math.h's mask of sixteen floats at a time with AVX-512, from exp(-x) instead of exp(-|x|) and with other roundings.
// In caches it is arithmetic that takes the time, a division as much as all the rest, and gcc takes the exponential's
// clamp for a branch whose one side it computes apart.
#pragma once
#include "../common/masks.h"

#ifdef FASTCL_X86
#include <immintrin.h>

namespace fastcl {

// 1 / d for d in [1, 2^126), within an ulp: an estimate of 14 bits and one step of Newton. 0 in the lanes that are not
// `kept`.
FASTCL_AVX512 inline __m512 reciprocal(__m512 d, __mmask16 kept) {
  const __m512 r = _mm512_rcp14_ps(d);
  return _mm512_maskz_fmadd_ps(kept, _mm512_fnmadd_ps(d, r, _mm512_set1_ps(1.f)), r, r);
}

constexpr float kEdge = 87.33f;  // of exponents: exp(-kEdge) is barely no denormal

// exp(y) after a clamp to [-kEdge, kEdge]; NaN stays NaN. 0 in the lanes that are not `kept`.
FASTCL_AVX512 inline __m512 exp_clamped(__m512 y, __mmask16 kept) {
  const __m512 one = _mm512_set1_ps(1.f), magic = _mm512_set1_ps(12582912.f);
  // of max's and min's operands the second stays where one is NaN
  y = _mm512_max_ps(_mm512_set1_ps(-kEdge), _mm512_min_ps(_mm512_set1_ps(kEdge), y));
  const __m512 n = _mm512_sub_ps(_mm512_fmadd_ps(y, _mm512_set1_ps(1.44269504f), magic), magic);
  const __m512 r =
      _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), y));
  __m512 p = _mm512_set1_ps(1.3814540e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3687451e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1668391e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666520e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.9999993e-1f));
  p = _mm512_fmadd_ps(_mm512_fmadd_ps(p, r, one), r, one);
  return _mm512_maskz_scalef_ps(kept, p, n);
}

// sigmoid(-y): 1 / (1 + exp(y)) needs no sign apart. 0 beyond kEdge, so that no product with it is a denormal.
FASTCL_AVX512 inline __m512 mask16(__m512 e, __m512 minus_scale) {
  const __m512 y = _mm512_mul_ps(minus_scale, e);
  const __mmask16 not_off = _mm512_cmp_ps_mask(y, _mm512_set1_ps(kEdge), _CMP_NGT_UQ);  // NaN too
  return reciprocal(_mm512_add_ps(_mm512_set1_ps(1.f), exp_clamped(y, 0xffff)), not_off);
}

struct MaskAndSlope16 {
  __m512 mask, slope;
};

FASTCL_AVX512 inline MaskAndSlope16 mask_and_slope16(__m512 e, __m512 minus_scale) {
  const __m512 y = _mm512_mul_ps(minus_scale, e);
  const __mmask16 not_off = _mm512_cmp_ps_mask(y, _mm512_set1_ps(kEdge), _CMP_NGT_UQ);
  const __mmask16 not_full = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-kEdge), _CMP_NLT_UQ);
  const __m512 q = exp_clamped(y, not_full);
  const __m512 mask = reciprocal(_mm512_add_ps(_mm512_set1_ps(1.f), q), not_off);
  // s m (1 - m), where 1 - m = q m is not what m rounds to
  return {mask, _mm512_fnmadd_ps(_mm512_mul_ps(q, mask), _mm512_mul_ps(minus_scale, mask), _mm512_setzero_ps())};
}

// Sixteen weights, or the first few of them: loading and storing under a mask takes a port as arithmetic does, and a
// loop of known length is unrolled (1.5M weights forward: 714 -> 557 us).
struct Whole {
  static constexpr __mmask16 lanes = 0xffff;
  FASTCL_AVX512 __m512 load(const float* x) const { return _mm512_loadu_ps(x); }
  FASTCL_AVX512 void store(float* x, __m512 value) const { _mm512_storeu_ps(x, value); }
  FASTCL_AVX512 __m128i load(const uint8_t* x) const { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)); }
};
struct Streamed : Whole {  // past the caches: the line's old contents are not read for it
  FASTCL_AVX512 void store(float* x, __m512 value) const { _mm512_stream_ps(x, value); }
};

struct First {
  const __mmask16 lanes;
  explicit First(int64_t n) : lanes(n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1)) {}
  FASTCL_AVX512 __m512 load(const float* x) const { return _mm512_maskz_loadu_ps(lanes, x); }
  FASTCL_AVX512 void store(float* x, __m512 value) const { _mm512_mask_storeu_ps(x, lanes, value); }
  FASTCL_AVX512 __m128i load(const uint8_t* x) const { return _mm_maskz_loadu_epi8(lanes, x); }
};

// Bits of the free ones among the weights from `at` on.
template <MaskKind kind, class Group>
FASTCL_AVX512 inline __mmask16 free_bits(const uint8_t* reserved, int64_t at, Group group) {
  if (kind == MaskKind::none) return group.lanes;
  if (kind == MaskKind::boolean)
    return _mm_mask_testn_epi8_mask(group.lanes, group.load(reserved + at), _mm_set1_epi8(-1));
  uint32_t bits = reserved[at / 8];
  if (group.lanes > 0xff) bits |= uint32_t(reserved[at / 8 + 1]) << 8;
  return static_cast<__mmask16>(group.lanes & ~bits);
}

// f(i, group) for the numbers from 0 to n, sixteen at a time.
template <class F>
FASTCL_AVX512 inline void by_sixteens(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, Whole{});
  if (i < n) f(i, First(n - i));
}

FASTCL_AVX512 inline void annealed_mask_avx512(float* m, const float* e, float scale, int64_t n) {
  const __m512 s = _mm512_set1_ps(-scale);
  by_sixteens(n, [&](int64_t i, auto group) FASTCL_AVX512 { group.store(m + i, mask16(group.load(e + i), s)); });
}

// With s_max > 0 HAT's compensated gradient.
FASTCL_AVX512 inline void annealed_mask_backward_avx512(float* ge, const float* gm, const float* e, float scale,
                                                        float s_max, int64_t n) {
  const __m512 s = _mm512_set1_ps(s_max > 0 ? -1.f : -scale), factor = _mm512_set1_ps(s_max > 0 ? s_max : 1.f);
  by_sixteens(n, [&](int64_t i, auto group) FASTCL_AVX512 {
    const __m512 slope = _mm512_mul_ps(mask_and_slope16(group.load(e + i), s).slope, factor);
    group.store(ge + i, _mm512_mul_ps(group.load(gm + i), slope));
  });
}

// masked_weight and, `kept`, the sum of m over free weights: eight additions in float, then double.
template <MaskKind kind, bool kept>
FASTCL_AVX512 double masked_weight_avx512(float* out, const float* w, const float* e, const uint8_t* reserved,
                                          float scale, int64_t begin, int64_t n) {
  const __m512 s = _mm512_set1_ps(-scale);
  const auto one = [&](int64_t i, auto group, __m512 sum) FASTCL_AVX512 {
    const __m512 mask = mask16(group.load(e + i), s);
    group.store(out + i, _mm512_mul_ps(group.load(w + i), mask));
    if (!kept) return sum;
    const __m512 share = _mm512_maskz_mov_ps(free_bits<kind>(reserved, begin + i, group), _mm512_set1_ps(1.f));
    return _mm512_fmadd_ps(mask, share, sum);  // NaN stays NaN where it is reserved, too
  };
  __m512d sums = _mm512_setzero_pd();
  for (int64_t at = 0; at < n; at += 128) {
    __m512 sum = _mm512_setzero_ps();
    if (at + 128 <= n)
      for (int k = 0; k < 8; ++k) sum = one(at + 16 * k, Whole{}, sum);
    else
      for (int64_t i = at; i < n; i += 16) sum = one(i, First(n - i), sum);
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_castps512_ps256(sum)));
    sums = _mm512_add_pd(sums, _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum, 1)));
  }
  return _mm512_reduce_add_pd(sums);
}

// s_max > 0: the slope is HAT's compensated one. `streamed`: gradients so large that whoever reads them next finds none
// of them in a cache either (10M weights: 7.2 -> 5.3 ms. A bare loop of it and of a plain step after it went from 13.5
// to 12.2 there, stayed at 7M, and took longer from 5M down).
template <MaskKind kind>
FASTCL_AVX512 void masked_weight_backward_avx512(float* gw, float* ge, const float* g, const float* w, const float* e,
                                                 const uint8_t* reserved, float scale, float s_max, float grad_kept,
                                                 int64_t begin, int64_t n, bool streamed) {
  const __m512 s = _mm512_set1_ps(-scale), gk = _mm512_set1_ps(grad_kept);
  const auto one = [&](int64_t i, auto group) FASTCL_AVX512 {
    const __mmask16 free = free_bits<kind>(reserved, begin + i, group);
    const __m512 x = group.load(e + i), grad = group.load(g + i), weight = group.load(w + i);
    MaskAndSlope16 both = mask_and_slope16(x, s);
    if (s_max > 0) both.slope = _mm512_mul_ps(mask_and_slope16(x, _mm512_set1_ps(-1.f)).slope, _mm512_set1_ps(s_max));
    const __m512 to_mask = _mm512_mul_ps(grad, weight);
    const __m512 to_w = _mm512_maskz_mul_ps(free, grad, both.mask);
    const __m512 to_e = _mm512_mul_ps(_mm512_mask_add_ps(to_mask, free, to_mask, gk), both.slope);
    group.store(gw + i, to_w);
    group.store(ge + i, to_e);
  };
  int64_t i = 0;
  if (streamed && (reinterpret_cast<uintptr_t>(gw) | reinterpret_cast<uintptr_t>(ge)) % 64 == 0) {
    for (; i + 16 <= n; i += 16) {
      for (const float* read : {g, w, e}) read_ahead<16>(read + i);
      one(i, Streamed{});
    }
    _mm_sfence();
  }
  for (; i + 16 <= n; i += 16) {
    for (const float* read : {g, w, e}) read_ahead<16>(read + i);
    for (float* written : {gw, ge}) write_ahead<16>(written + i);
    one(i, Whole{});
  }
  if (i < n) one(i, First(n - i));
}

// f(kind) as a constant, for the masks that are bits.
template <class F>
bool dispatch_bits(MaskKind kind, const F& f) {
  if (kind == MaskKind::none) return f(std::integral_constant<MaskKind, MaskKind::none>{}), true;
  if (kind == MaskKind::boolean) return f(std::integral_constant<MaskKind, MaskKind::boolean>{}), true;
  if (kind == MaskKind::packed) return f(std::integral_constant<MaskKind, MaskKind::packed>{}), true;
  return false;
}

}  // namespace fastcl
#endif

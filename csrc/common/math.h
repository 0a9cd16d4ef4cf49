// Scalar mathematics shared by every kernel, on CPU and GPU compilers alike. No torch, no loops.
#pragma once
#include <cstdint>
#include <cstring>
#ifndef __GNUC__
#include <cmath>
#endif

#if defined(__CUDACC__) || defined(__HIPCC__)
#define FASTCL_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// always_inline lets one body be compiled into functions of different instruction sets (cpu.h).
#define FASTCL_HD inline __attribute__((always_inline))
#else
#define FASTCL_HD __forceinline
#endif

// A lambda inside a body must be inlined like the body itself.
#ifdef __GNUC__
#define FASTCL_LAMBDA_HD __attribute__((always_inline))
#else
#define FASTCL_LAMBDA_HD
#endif

namespace fastcl {

FASTCL_HD int32_t float_bits(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

FASTCL_HD float float_from_bits(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp(x) without a branch, so that loops over it vectorise: x = n ln 2 + r, exp = 2^n P(r), |r| <= ln(2)/2.
// Within 2 ulp on [-87.33, 88.0], 0 below (no denormals: they cost a loop three times its time), saturating above;
// NaN stays NaN.
FASTCL_HD float exp_not_positive(float x) {
  x = x < -87.33f ? -88.0f : x;                        // n = -127 there: the exponent's bits are 0
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low mantissa bits now hold n
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3814540e-3f;  // minimax: 4e-9
  p = p * r + 8.3687451e-3f;
  p = p * r + 4.1668391e-2f;
  p = p * r + 1.6666520e-1f;
  p = p * r + 4.9999993e-1f;
  p = (p * r + 1.f) * r + 1.f;
  return p * float_from_bits(
                 static_cast<int32_t>(static_cast<uint32_t>(float_bits(shifted) - float_bits(12582912.f) + 127) << 23));
}
FASTCL_HD float exp(float x) { return exp_not_positive(x > 88.0f ? 88.0f : x); }

// The same in double: Taylor to r^13 leaves 1e-17 at |r| = ln(2)/2.
FASTCL_HD double exp_not_positive(double x) {
  x = x < -709.0 ? -709.0 : x;
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.4426950408889634 + magic;
  const double n = shifted - magic;
  const double r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  int64_t bits, base;
  std::memcpy(&bits, &shifted, sizeof bits);
  std::memcpy(&base, &magic, sizeof base);
  bits = static_cast<int64_t>(static_cast<uint64_t>(bits - base + 1023) << 52);
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}
FASTCL_HD double exp(double x) { return exp_not_positive(x > 709.0 ? 709.0 : x); }

#ifdef __GNUC__  // the builtins vectorise under -fno-math-errno
FASTCL_HD float sqrt(float x) { return __builtin_sqrtf(x); }
FASTCL_HD double sqrt(double x) { return __builtin_sqrt(x); }
FASTCL_HD float abs(float x) { return __builtin_fabsf(x); }
FASTCL_HD double abs(double x) { return __builtin_fabs(x); }
#else
FASTCL_HD float sqrt(float x) { return std::sqrt(x); }
FASTCL_HD double sqrt(double x) { return std::sqrt(x); }
FASTCL_HD float abs(float x) { return std::fabs(x); }
FASTCL_HD double abs(double x) { return std::fabs(x); }
#endif

}  // namespace fastcl

// Normal variates from random words (Box & Muller 1958), with a logarithm and a sine that have no branch, so that a
// loop over them vectorises and every compiler and device computes the same formula.
#pragma once
#include "../common/math.h"

namespace fastcl {

// log(u) for normal u in (0, 1]; relative error 1e-7, also next to 1, where it makes small radii: with u = 2^n (1 + f),
// f + f^2 (f p(f) - 1/2) + n log 2, p minimax (6e-9).
FASTCL_HD float log_unit(float u) {
  const int32_t bits = float_bits(u);
  const int32_t shifted = bits - 0x3f3504f3;  // sqrt(1/2): the mantissa is brought to [sqrt(1/2), sqrt(2))
  const float n = static_cast<float>(shifted >> 23);
  const float f = float_from_bits((shifted & 0x7fffff) + 0x3f3504f3) - 1.f;
  float p = -7.635556257e-2f;
  p = p * f + 1.276162402e-1f;
  p = p * f - 1.315975386e-1f;
  p = p * f + 1.420171585e-1f;
  p = p * f - 1.662340295e-1f;
  p = p * f + 2.000123117e-1f;
  p = p * f - 2.500081960e-1f;
  p = p * f + 3.333333161e-1f;
  return n * 6.931471806e-1f + (f * f * (f * p - 0.5f) + f);
}

// The same in double: fdlibm's form, log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)) with s = f / (2 + f).
FASTCL_HD double log_unit(double u) {
  int64_t bits;
  std::memcpy(&bits, &u, sizeof bits);
  const int64_t half = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const int64_t shifted = bits - half;
  const int64_t mantissa = (shifted & 0xfffffffffffff) + half;
  double m;
  std::memcpy(&m, &mantissa, sizeof m);
  const double n = static_cast<double>(static_cast<int32_t>(shifted >> 52));
  const double f = m - 1.0, s = f / (2.0 + f), z = s * s, square = 0.5 * f * f;
  double r = 1.479819860511658591e-01;
  r = r * z + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  return n * 6.93147180369123816490e-01 - ((square - (s * (square + r * z) + n * 1.90821492927058770002e-10)) - f);
}

template <class T>
struct SinCos {
  T sin, cos;
};

// Of pi h, for |h| <= 1/2. Minimax polynomials in h^2, whose errors are 3e-9 and 3e-10.
FASTCL_HD SinCos<float> sincos_half_turn(float h) {
  const float y = h * h;
  float s = 7.722224761e-2f, c = -2.442107905e-2f;
  s = s * y - 5.980464497e-1f;
  s = s * y + 2.550031641f;
  s = s * y - 5.167706900f;
  s = s * y + 3.141592581f;
  c = c * y + 2.349541715e-1f;
  c = c * y - 1.335216161f;
  c = c * y + 4.058709605f;
  c = c * y - 4.934802156f;
  return {s * h, c * y + 1.f};
}
FASTCL_HD SinCos<double> sincos_half_turn(double h) {  // Taylor: what is left out is below 2e-18
  const double x = h * 3.14159265358979323846, y = x * x;
  double s = 1.0 / 51090942171709440000.0;
  s = s * y - 1.0 / 121645100408832000.0;
  s = s * y + 1.0 / 355687428096000.0;
  s = s * y - 1.0 / 1307674368000.0;
  s = s * y + 1.0 / 6227020800.0;
  s = s * y - 1.0 / 39916800.0;
  s = s * y + 1.0 / 362880.0;
  s = s * y - 1.0 / 5040.0;
  s = s * y + 1.0 / 120.0;
  s = s * y - 1.0 / 6.0;
  double c = -1.0 / 1124000727777607680000.0;
  c = c * y + 1.0 / 2432902008176640000.0;
  c = c * y - 1.0 / 6402373705728000.0;
  c = c * y + 1.0 / 20922789888000.0;
  c = c * y - 1.0 / 87178291200.0;
  c = c * y + 1.0 / 479001600.0;
  c = c * y - 1.0 / 3628800.0;
  c = c * y + 1.0 / 40320.0;
  c = c * y - 1.0 / 720.0;
  c = c * y + 1.0 / 24.0;
  return {s * y * x + x, c * y * y - 0.5 * y + 1.0};
}

template <class T>
struct Pair {
  T first, second;
};

// x, negated where the top bit of `sign` is set.
FASTCL_HD float flip(float x, uint32_t sign) {
  return float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(float_bits(x)) ^ (sign & 0x80000000u)));
}
FASTCL_HD double flip(double x, uint32_t sign) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits ^= static_cast<uint64_t>(sign & 0x80000000u) << 32;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Two words to two normals: r = sqrt(-2 log u), angle 2 pi v. u = a 2^-32 + 2^-33 is *defined* as rounded to float (a
// float keeps more of a small u: tails reach 6.7 sigma), so that float and double arithmetic follow one stream.
// v = b 2^-32; the nearest half turn is taken off in integers, exactly, before any rounding: it changes both signs.
template <class T>
FASTCL_HD Pair<T> box_muller(uint32_t a, uint32_t b) {
  const float u = static_cast<float>(a) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const uint32_t half_turn = (b + 0x40000000u) & 0x80000000u;
  const int32_t rest = static_cast<int32_t>(b ^ half_turn);                                  // in [-2^30, 2^30)
  const SinCos<T> turn = sincos_half_turn(static_cast<T>(rest) * T(4.656612873077393e-10));  // 2^-31
  const T r = flip(sqrt(T(-2) * log_unit(static_cast<T>(u))), half_turn);
  return {r * turn.cos, r * turn.sin};
}

}  // namespace fastcl

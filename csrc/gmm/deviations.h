// The deviations of a component without a factor, or on its diagonal.
#pragma once
#include <cmath>

#include "../common/cpu.h"

namespace fastcl {

// What a component's deviations give, past loops that wait for one thing at a time: with a hundred components they took
// a twentieth of the whole.
struct Deviations {
  bool good;   // positive and finite
  double log;  // of their product: one logarithm for all, of the mantissas' product
};
template <class T, class In>
struct Invert {  // inverse[i] = 1 / l[i]
  static FASTCL_HD Deviations run(T* FASTCL_RESTRICT inverse, const In* FASTCL_RESTRICT l, int64_t n) {
    constexpr int64_t kFactors = 512;  // of mantissas below 2: their product is a double
    constexpr int kWays = 8;
    int64_t exponent = 0, bad = 0;
    double rest = 1;
    for (int64_t first = 0; first < n; first += kFactors) {
      double product[kWays];
      int64_t exponents[kWays] = {}, wrong[kWays] = {};
      for (int w = 0; w < kWays; ++w) product[w] = 1;
      const auto one = [&](int64_t i, int w) FASTCL_LAMBDA_HD {
        // a subnormal double has no such mantissa: taken times 2^54
        const double value = load(l + i), normal = value < 0x1p-1022 ? value * 0x1p54 : value;
        int64_t bits;
        std::memcpy(&bits, &normal, sizeof bits);
        exponents[w] += (bits >> 52) - 1023 - (value < 0x1p-1022 ? 54 : 0);
        bits = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
        double mantissa;
        std::memcpy(&mantissa, &bits, sizeof mantissa);
        product[w] *= mantissa;
        wrong[w] += !(value > 0) + !(value <= 0x1.fffffffffffffp1023);
        inverse[i] = static_cast<T>(1.0 / value);
      };
      const int64_t last = std::min(n, first + kFactors);
      int64_t i = first;
      for (; i + kWays <= last; i += kWays)
        for (int w = 0; w < kWays; ++w) one(i + w, w);
      for (; i < last; ++i) one(i, static_cast<int>(i % kWays));
      for (int w = 0; w < kWays; ++w) {
        bad += wrong[w];
        exponent += exponents[w];
        rest *= product[w];
      }
      int carried;
      rest = std::frexp(rest, &carried);
      exponent += carried;
    }
    return {bad == 0, std::log(rest) + double(exponent) * 0.69314718055994530942};
  }
};

// The part of a log density that x does not change, of deviations whose logarithms sum to `log`.
inline double log_constant(double log, int64_t features) {
  return -log - 0.5 * double(features) * 1.8378770664093453;  // ln 2 pi
}

inline void check_deviations(const char* op, const std::vector<char>& good) {
  for (size_t k = 0; k < good.size(); ++k)
    FASTCL_CHECK(good[k], op, ": scale_trils of component ", k, " must have a positive, finite diagonal");
}

}  // namespace fastcl

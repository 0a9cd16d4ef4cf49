// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of
// a 128-bit counter under a 64-bit key. No state: value number n is computed directly, on any thread, in any order.
#pragma once
#include "cpu.h"
#include "math.h"

#ifdef FASTCL_X86
#include <immintrin.h>
#endif

namespace fastcl {

struct Philox {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;  // the round's factors
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;  // what the key grows by

// Straight-line code on 32-bit words: a loop over counters vectorises, but see philox_words.
FASTCL_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
#ifdef __GNUC__
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(kPhiloxM0) * c0, product1 = uint64_t(kPhiloxM1) * c2;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
    c0 = high1 ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = high0 ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// The ten rounds' keys: both words of the key grow by a constant from round to round.
struct PhiloxKeys {
  uint32_t first[10], second[10];
  explicit PhiloxKeys(uint64_t key) {
    for (uint32_t round = 0; round < 10; ++round) {
      first[round] = static_cast<uint32_t>(key) + round * kPhiloxW0;
      second[round] = static_cast<uint32_t>(key >> 32) + round * kPhiloxW1;
    }
  }
};

// The first rounds, where but one word of the counter (c0, c1, 0, c3) differs from lane to lane: what is the same for
// all of them. After the third a lane's words are c0 = high1 ^ third0, c1 = low1, c2 = low0 ^ third2 and third3, with
// M0 (c1 ^ first) = (high0, low0) and M1 (high0 ^ second) = (high1, low1).
struct PhiloxStart {
  uint32_t first, second, third0, third2, third3;
  PhiloxStart(uint32_t c0, uint32_t c3, const PhiloxKeys& keys) {
    const uint64_t product0 = uint64_t(kPhiloxM0) * c0;
    const uint64_t product1 = uint64_t(kPhiloxM1) * (static_cast<uint32_t>(product0 >> 32) ^ c3 ^ keys.second[0]);
    const uint64_t product2 = uint64_t(kPhiloxM0) * (static_cast<uint32_t>(product1 >> 32) ^ keys.first[1]);
    first = keys.first[0];
    second = static_cast<uint32_t>(product0) ^ keys.second[1];
    third0 = static_cast<uint32_t>(product1) ^ keys.first[2];
    third2 = static_cast<uint32_t>(product2 >> 32) ^ keys.second[2];
    third3 = static_cast<uint32_t>(product2);
  }
};

// words[w * stride + s] = word w of counter (c0, c1[s], 0, c3), for s < n.
using PhiloxWords = void (*)(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1, uint32_t c3, int64_t n,
                             const PhiloxKeys& keys);

inline void philox_words_plain(uint32_t* FASTCL_RESTRICT words, int64_t stride, uint32_t c0,
                               const uint32_t* FASTCL_RESTRICT c1, uint32_t c3, int64_t n, const PhiloxKeys& keys) {
  for (int64_t s = 0; s < n; ++s) {
    const Philox found = philox(c0, c1[s], 0, c3, keys.first[0], keys.second[0]);
    for (int w = 0; w < 4; ++w) words[w * stride + s] = found.word[w];
  }
}

#ifdef FASTCL_X86
// By intrinsics: of the plain loop gcc takes every product apart into 32-bit lanes and puts it together again. Here
// counters stay in 64-bit lanes, even ones in `a` and odd ones in `b`, and whatever the upper halves hold is ignored by
// the next multiplication.
FASTCL_AVX2 inline void philox_words_avx2(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1, uint32_t c3,
                                          int64_t n, const PhiloxKeys& keys) {
  const auto all = [](uint32_t x) FASTCL_AVX2 { return _mm256_set1_epi32(static_cast<int>(x)); };
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i lower = _mm256_set1_epi64x(0xFFFFFFFF);
  const PhiloxStart start(c0, c3, keys);
  int64_t s = 0;
  for (; s + 8 <= n; s += 8) {
    const __m256i low =
        _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c1 + s)), all(start.first));
    __m256i a[4], b[4];
    for (int odd = 0; odd < 2; ++odd) {
      __m256i* c = odd ? b : a;
      const __m256i product0 = _mm256_mul_epu32(odd ? _mm256_srli_epi64(low, 32) : low, m0);
      c[1] = _mm256_mul_epu32(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), all(start.second)), m1);
      c[0] = _mm256_xor_si256(_mm256_srli_epi64(c[1], 32), all(start.third0));
      c[2] = _mm256_xor_si256(product0, all(start.third2));
      c[3] = all(start.third3);
    }
#pragma GCC unroll 7
    for (int round = 3; round < 10; ++round) {
      const __m256i key_a = all(keys.first[round]), key_b = all(keys.second[round]);
      for (__m256i* c : {a, b}) {
        const __m256i product0 = _mm256_mul_epu32(c[0], m0), product1 = _mm256_mul_epu32(c[2], m1);
        c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c[1]), key_a);
        c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c[3]), key_b);
        c[1] = product1;
        c[3] = product0;
      }
    }
    for (int w = 0; w < 4; ++w)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + w * stride + s),
                          _mm256_or_si256(_mm256_and_si256(a[w], lower), _mm256_slli_epi64(b[w], 32)));
  }
  if (s < n) philox_words_plain(words + s, stride, c0, c1 + s, c3, n - s, keys);
}

// The same with twice the lanes, and an exclusive or of three in one instruction, which reads a round's key from
// memory.
FASTCL_AVX512 inline void philox_words_avx512(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1,
                                              uint32_t c3, int64_t n, const PhiloxKeys& keys) {
  const auto all = [](uint32_t x) FASTCL_AVX512 { return _mm512_set1_epi32(static_cast<int>(x)); };
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const PhiloxStart start(c0, c3, keys);
  int64_t s = 0;
  for (; s + 16 <= n; s += 16) {
    const __m512i low = _mm512_xor_si512(_mm512_loadu_si512(c1 + s), all(start.first));
    __m512i a[4], b[4];
    for (int odd = 0; odd < 2; ++odd) {
      __m512i* c = odd ? b : a;
      const __m512i product0 = _mm512_mul_epu32(odd ? _mm512_srli_epi64(low, 32) : low, m0);
      c[1] = _mm512_mul_epu32(_mm512_xor_si512(_mm512_srli_epi64(product0, 32), all(start.second)), m1);
      c[0] = _mm512_xor_si512(_mm512_srli_epi64(c[1], 32), all(start.third0));
      c[2] = _mm512_xor_si512(product0, all(start.third2));
      c[3] = all(start.third3);
    }
#pragma GCC unroll 7
    for (int round = 3; round < 10; ++round) {
      const __m512i key_a = all(keys.first[round]), key_b = all(keys.second[round]);
      for (__m512i* c : {a, b}) {
        const __m512i product0 = _mm512_mul_epu32(c[0], m0), product1 = _mm512_mul_epu32(c[2], m1);
        c[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product1, 32), c[1], key_a, 0x96);
        c[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(product0, 32), c[3], key_b, 0x96);
        c[1] = product1;
        c[3] = product0;
      }
    }
    for (int w = 0; w < 4; ++w)  // even lanes from a, odd ones from b's even ones
      _mm512_storeu_si512(words + w * stride + s, _mm512_mask_shuffle_epi32(a[w], 0xAAAA, b[w], _MM_PERM_CCAA));
  }
  if (s < n) philox_words_plain(words + s, stride, c0, c1 + s, c3, n - s, keys);
}
#endif

inline PhiloxWords philox_words() {  // for this CPU; the words are the same
#ifdef FASTCL_X86
  if (isa() == Isa::avx512) return philox_words_avx512;
  if (isa() != Isa::baseline) return philox_words_avx2;
#endif
  return philox_words_plain;
}

}  // namespace fastcl

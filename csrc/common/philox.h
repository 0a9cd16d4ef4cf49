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

// words[w * stride + s] = word w of counter (c0, c1[s], 0, c3[s]), for s < n.
using PhiloxWords = void (*)(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1, const uint32_t* c3,
                             int64_t n, uint32_t key0, uint32_t key1);

inline void philox_words_plain(uint32_t* FASTCL_RESTRICT words, int64_t stride, uint32_t c0,
                               const uint32_t* FASTCL_RESTRICT c1, const uint32_t* FASTCL_RESTRICT c3, int64_t n,
                               uint32_t key0, uint32_t key1) {
  for (int64_t s = 0; s < n; ++s) {
    const Philox found = philox(c0, c1[s], 0, c3[s], key0, key1);
    for (int w = 0; w < 4; ++w) words[w * stride + s] = found.word[w];
  }
}

#ifdef FASTCL_X86
// By intrinsics: of the plain loop gcc takes every product apart into 32-bit lanes and puts it together again. Here
// counters stay in 64-bit lanes, even ones in `a` and odd ones in `b`, and whatever the upper halves hold is ignored by
// the next multiplication.
FASTCL_AVX2 inline void philox_words_avx2(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1,
                                          const uint32_t* c3, int64_t n, uint32_t key0, uint32_t key1) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i lower = _mm256_set1_epi64x(0xFFFFFFFF);
  int64_t s = 0;
  for (; s + 8 <= n; s += 8) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c1 + s));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(c3 + s));
    const __m256i first = _mm256_set1_epi32(static_cast<int>(c0)), zero = _mm256_setzero_si256();
    __m256i a[4] = {first, low, zero, high};
    __m256i b[4] = {first, _mm256_srli_epi64(low, 32), zero, _mm256_srli_epi64(high, 32)};
    uint32_t k0 = key0, k1 = key1;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const __m256i key_a = _mm256_set1_epi32(static_cast<int>(k0)), key_b = _mm256_set1_epi32(static_cast<int>(k1));
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
  if (s < n) philox_words_plain(words + s, stride, c0, c1 + s, c3 + s, n - s, key0, key1);
}

// The same with twice the lanes, an exclusive or of three in one instruction, which reads a round's key from memory.
// The first round's products are one number and zero.
FASTCL_AVX512 inline void philox_words_avx512(uint32_t* words, int64_t stride, uint32_t c0, const uint32_t* c1,
                                              const uint32_t* c3, int64_t n, uint32_t key0, uint32_t key1) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const uint64_t product = uint64_t(kPhiloxM0) * c0;
  const __m512i first_key_a = _mm512_set1_epi32(static_cast<int>(key0));
  const __m512i first_key_b = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(product >> 32) ^ key1));
  const __m512i rest = _mm512_set1_epi32(static_cast<int>(static_cast<uint32_t>(product))),
                zero = _mm512_setzero_si512();
  uint32_t keys[9][2];
  for (uint32_t round = 0; round < 9; ++round) {
    keys[round][0] = key0 + (round + 1) * kPhiloxW0;
    keys[round][1] = key1 + (round + 1) * kPhiloxW1;
  }
  int64_t s = 0;
  for (; s + 16 <= n; s += 16) {
    const __m512i low = _mm512_xor_si512(_mm512_loadu_si512(c1 + s), first_key_a);
    const __m512i high = _mm512_xor_si512(_mm512_loadu_si512(c3 + s), first_key_b);
    __m512i a[4] = {low, zero, high, rest};
    __m512i b[4] = {_mm512_srli_epi64(low, 32), zero, _mm512_srli_epi64(high, 32), rest};
#pragma GCC unroll 9
    for (const auto& key : keys) {
      const __m512i key_a = _mm512_set1_epi32(static_cast<int>(key[0]));
      const __m512i key_b = _mm512_set1_epi32(static_cast<int>(key[1]));
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
  if (s < n) philox_words_plain(words + s, stride, c0, c1 + s, c3 + s, n - s, key0, key1);
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

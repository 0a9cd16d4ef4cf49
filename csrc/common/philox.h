// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a bijection of
// a 128-bit counter under a 64-bit key. No state: value number n is computed directly, on any thread, in any order.
#pragma once
#include "math.h"

namespace fastcl {

struct Philox {
  uint32_t word[4];
};

// Straight-line code on 32-bit words: a loop over counters vectorises.
FASTCL_HD Philox philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) {
#ifdef __GNUC__
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(0xD2511F53u) * c0, product1 = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t high0 = static_cast<uint32_t>(product0 >> 32), high1 = static_cast<uint32_t>(product1 >> 32);
    c0 = high1 ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = high0 ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastcl

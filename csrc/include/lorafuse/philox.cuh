// The dropout mask of lorafuse/philox.py, which defines it: Philox 4x32-10.
//
// Element (m, k) of an input with K columns has the index i = m K + k; its word is word i % 4 of the counter i / 4, and
// it is kept when that word is at least floor(p 2^32). Four neighbours share one counter when K is a multiple of 4.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

LF_HOST_DEVICE constexpr void philox_4x32(uint64_t seed, uint64_t counter, uint32_t (&words)[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = 0, c3 = 0;
  LF_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c0} * 0xD2511F53u, p1 = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

}  // namespace lorafuse

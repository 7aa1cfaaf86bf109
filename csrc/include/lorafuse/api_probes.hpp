// What bench/hopper.py --probes measures and no layer runs: the prices on which the design of the kernels depends.
//
// As in api.hpp: pointers of the device, sizes and strides in elements, launches on a stream; functions check their
// arguments and throw std::invalid_argument.
#pragma once

#include <cstdint>

namespace lorafuse {

// y = x wᵀ in bf16 by tiles of 128 x 256, and where `a` is given xa = x aᵀ of 16 ranks: every tile multiplies these
// columns too, by the x that is in shared memory anyway, and the first tile of a row stores them.
struct ProbeColumns {
  int64_t M, N, K;  // multiples of 8
  const void* x;    // [M, K]
  const void* w;    // [N, K]
  const void* a;    // [16, K] or null
  void* y;          // [M, N]
  void* xa;         // [M, 16], with a
  int sms;          // blocks at most; 0: one for each SM
};
void probe_columns(const ProbeColumns& p, void* stream);

// Two blocks hand a number to each other `rounds` times, each time through an ordinary word that a flag publishes: it
// is 2 · rounds in the end. words: two flags, zero before, then the number.
struct ProbeFlags {
  int64_t rounds;
  uint32_t* words;  // [3]
};
void probe_flags(const ProbeFlags& p, void* stream);

}  // namespace lorafuse

// The matrix product of a warpgroup, emulated.
#pragma once

#include <lorafuse/ptx/barrier.cuh>
#include <lorafuse/ptx/convert.cuh>

namespace lorafuse::ptx {

inline void wgmma_fence() { emu::wgmma_fence(); }
inline void wgmma_commit() { emu::wgmma_commit(); }
template <int kPending>
inline void wgmma_wait() {
  emu::wgmma_wait(kPending);
}

enum class Major { K, MN };

template <class T, int N, Major kMajorB, Major kMajorA = Major::K>
inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 128 || N == 256 || (kMajorA == Major::K && (N == 16 || N == 32 || N == 64)));
  emu::wgmma(kElement<T>, N, kMajorA == Major::MN, kMajorB == Major::MN, d, a, b, accumulate != 0);
}

}  // namespace lorafuse::ptx

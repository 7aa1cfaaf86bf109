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

// The same with a from registers, which nothing else may read or write until the product has been waited for. Register
// i of thread t of the warpgroup holds two elements, the lower one first, of row t / 32 * 16 + t % 32 / 4 + i % 2 * 8 and
// columns from i / 2 * 8 + t % 4 * 2 on. No kernel for the device has it yet.
using OperandRegister = emu::OperandRegister;
template <class T, int N, Major kMajorB>
inline void wgmma(float (&d)[N / 2], OperandRegister (&a)[4], uint64_t b, int accumulate) {
  static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);
  emu::wgmma(kElement<T>, N, kMajorB == Major::MN, d, a, b, accumulate != 0);
}

}  // namespace lorafuse::ptx

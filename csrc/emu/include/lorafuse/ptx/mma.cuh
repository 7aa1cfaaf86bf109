// Asynchronous copies of 16 bytes, ldmatrix and the matrix product of one warp, emulated.
#pragma once

#include <lorafuse/ptx/barrier.cuh>
#include <lorafuse/ptx/convert.cuh>

namespace lorafuse::ptx {

inline void copy_async(void* shared, const void* global, int bytes) { emu::copy_async(shared, global, bytes); }
inline void copy_async_commit() { emu::copy_async_commit(); }
template <int kPending>
inline void copy_async_wait() {
  emu::copy_async_wait(kPending);
}

inline void ldmatrix(uint32_t (&values)[4], const void* row) { emu::ldmatrix(values, row, false); }
inline void ldmatrix_transposed(uint32_t (&values)[4], const void* row) { emu::ldmatrix(values, row, true); }

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emu::mma(kElement<T>, d, a, b0, b1);
}

}  // namespace lorafuse::ptx

// The gradient of a factor for each column of a matrix in fp32, which DoRA adds to a layer, y = z * factor:
//
//   dz[M, C] = dy * factor,   dfactor[C] = sum over rows of dy * z
//
// from one read of dy, where torch takes a pass for each operation and memory for what lies between: 0.28 ms instead of
// 0.67 (256 x 1024, medians, one thread of an EPYC, 2026-11-30, idle). y itself is as fast in torch. Each thread has
// columns of its own, in blocks whose sums stay in the first-level cache; rows are summed in blocks of 64, so that errors
// do not add up, in an order that depends on nothing.

#include <algorithm>
#include <cstdint>

#include "threads.hpp"

#define LORAFUSE_EXPORT __attribute__((visibility("default")))
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
// resolved when the module is loaded
#define LORAFUSE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define LORAFUSE_CLONES
#endif

namespace {

constexpr int64_t kColumns = 512;
constexpr int64_t kRows = 64;

int64_t columns_of_thread(int64_t C, int threads) { return ((C + threads - 1) / threads + 15) / 16 * 16; }

LORAFUSE_CLONES void backward_row(
    const float* __restrict__ dy, const float* __restrict__ z, const float* __restrict__ factor, float* __restrict__ dz,
    float* __restrict__ sums, int64_t count) {
  if (dz && sums) {
    for (int64_t c = 0; c < count; ++c) {
      dz[c] = dy[c] * factor[c];
      sums[c] += dy[c] * z[c];
    }
  } else if (dz) {
    for (int64_t c = 0; c < count; ++c) dz[c] = dy[c] * factor[c];
  } else {
    for (int64_t c = 0; c < count; ++c) sums[c] += dy[c] * z[c];
  }
}

void backward_columns(
    const float* dy, int64_t dy_row, const float* z, int64_t z_row, int64_t M, int64_t C, const float* factor,
    float* dz, float* dfactor, int64_t start, int64_t stop) {
  float sums[kColumns], total[kColumns];
  for (int64_t c = start; c < stop; c += kColumns) {
    const int64_t count = std::min(kColumns, stop - c);
    std::fill(total, total + count, 0.0f);
    for (int64_t first = 0; first < M; first += kRows) {
      std::fill(sums, sums + count, 0.0f);
      for (int64_t m = first; m < std::min(M, first + kRows); ++m) {
        backward_row(
            dy + m * dy_row + c, dfactor ? z + m * z_row + c : nullptr, factor + c, dz ? dz + m * C + c : nullptr,
            dfactor ? sums : nullptr, count);
      }
      for (int64_t i = 0; i < count; ++i) total[i] += sums[i];
    }
    if (dfactor) std::copy(total, total + count, dfactor + c);
  }
}

}  // namespace

extern "C" {

// See the top: `dz`, which has no gaps, or `dfactor` and z may be null.
LORAFUSE_EXPORT void lorafuse_columns_backward(
    const float* dy, int64_t dy_row, const float* z, int64_t z_row, int64_t M, int64_t C, const float* factor,
    float* dz, float* dfactor, int threads) {
  const int64_t step = columns_of_thread(C, threads);
  lorafuse::parallel(threads, (C + step - 1) / step, [&](int64_t part) {
    backward_columns(
        dy, dy_row, z, z_row, M, C, factor, dz, dfactor, part * step, std::min(C, (part + 1) * step));
  });
}
}

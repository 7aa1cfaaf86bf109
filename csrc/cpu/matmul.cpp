// y[M, N] = x[M, K] w[N, K]^T + bias[N] + alpha * narrow[M, R] factor[N, R]^T in fp32, or y += that: each thread has
// columns of its own, cut into blocks that it multiplies by the library's sgemm alone, and to which it adds the low-rank
// product while they are in its caches. A quantized w is decoded block by block into a buffer that stays there.
//
// A library's own threads share one product: they wait for each other when an operand was packed and at the end, and
// with two of them MKL reached 44 to 103 of some 150 GFLOP/s at 128 and 256 rows, blocks 70 to 145 (docs/performance.md).
// Sums over K of a dense w are the library's; of a quantized one they are cut every kReduced elements.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "rank_add.hpp"
#include "stored.hpp"
#include "threads.hpp"

namespace {

// of a block, at most; and of a quantized w the elements of a row that are decoded at a time: 432 KiB with them
constexpr int64_t kColumns = 288;
constexpr int64_t kReduced = 384;
constexpr int64_t kUnit = 16;

// BLAS's sgemm, of matrices whose columns are contiguous
using Gemm = void (*)(
    const char*, const char*, const int*, const int*, const int*, const float*, const float*, const int*, const float*,
    const int*, const float*, float*, const int*);

}  // namespace

extern "C" {

// An operand of `lorafuse_matmul`; ctypes fills it.
struct LorafuseMatmul {
  Gemm gemm;
  const float* x;
  int64_t x_row, M, K, N;
  // w[n, k] is at n * w_row + k, or where it is transposed at k * w_row + n; elements `first` and on where it is stored
  const float* w;
  const lorafuse::Stored* stored;
  int64_t w_row, first;
  float* y;
  int64_t y_row;
  const float* bias;
  const float* narrow;
  int64_t narrow_row, R;
  const float* factor;
  int64_t factor_column, factor_rank;
  float alpha;
  // w; y is added to; elements of a stored w are rounded to bf16, as its library does
  int is_transposed, adds, rounds;
};
}

namespace {

#if defined(__x86_64__)

// each number to the nearest bf16, ties to even; a NaN stays one
LORAFUSE_AVX2 void round_to_bf16(float* numbers, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, numbers + i, sizeof bits);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    bits = (is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    std::memcpy(numbers + i, &bits, sizeof bits);
  }
}

// y[:, start ... start + n - 1]
void of_columns(const LorafuseMatmul& of, int64_t start, int64_t n) {
  const int M = int(of.M), N = int(n), x_row = int(of.x_row), y_row = int(of.y_row);
  const float one = 1;
  float* y = of.y + start;
  float kept = of.adds ? 1.0f : 0.0f;
  if (of.bias) {
    for (int64_t m = 0; m < of.M; ++m) {
      float* row = y + m * of.y_row;
      for (int64_t j = 0; j < n; ++j) row[j] = (of.adds ? row[j] : 0.0f) + of.bias[start + j];
    }
    kept = 1;
  }
  const auto multiply = [&](const float* w, int w_row, int64_t first, int64_t count) {
    const int K = int(count);
    of.gemm(of.is_transposed ? "N" : "T", "N", &N, &M, &K, &one, w, &w_row, of.x + first, &x_row, &kept, y, &y_row);
    kept = 1;
  };
  if (!of.stored) {
    multiply(of.w + start * (of.is_transposed ? 1 : of.w_row), int(of.w_row), 0, of.K);
  } else {
    thread_local std::unique_ptr<float[]> block(new float[kColumns * kReduced]);
    for (int64_t k = 0; k < of.K; k += kReduced) {
      const int64_t count = std::min(kReduced, of.K - k);
      const int64_t rows = of.is_transposed ? count : n, columns = of.is_transposed ? n : count;
      const int64_t from = of.first + (of.is_transposed ? k * of.w_row + start : start * of.w_row + k);
      for (int64_t i = 0; i < rows; ++i) {
        of.stored->decode(from + i * of.w_row, from + i * of.w_row + columns, block.get() + i * columns);
      }
      if (of.rounds) round_to_bf16(block.get(), rows * columns);
      multiply(block.get(), int(columns), k, count);
    }
  }
  if (of.R) {
    lorafuse::add_columns(
        of.y, of.y_row, of.M, of.R, of.narrow, of.narrow_row, {of.factor, of.factor_column, of.factor_rank}, of.alpha,
        start, start + n);
  }
}
#endif

}  // namespace

extern "C" {

// See the top: `stored` or `w`; `bias` may be null, and R 0. M, K and N are positive, of a factor one stride is 1.
__attribute__((visibility("default"))) void lorafuse_matmul(const LorafuseMatmul* of, int threads) {
#if defined(__x86_64__)
  // as many blocks for each thread
  const int64_t most = threads * kColumns, parts = threads * ((of->N + most - 1) / most);
  const int64_t units = (of->N + kUnit - 1) / kUnit, step = (units + parts - 1) / parts * kUnit;
  lorafuse::parallel(threads, (of->N + step - 1) / step, [&](int64_t i) {
    of_columns(*of, i * step, std::min(step, of->N - i * step));
  });
#endif
}
}

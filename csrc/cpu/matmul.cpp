// y[M, N] = x[M, K] w[N, K]^T + bias[N] + alpha * narrow[M, R] factor[N, R]^T in fp32, or y += that, for CPUs with AVX2 and
// FMA: each thread has columns of its own, cut into blocks whose w is packed into panels, quantized ones as they are
// decoded, and whose low-rank product is the end of the reduction.
//
// A library's threads share one product: they wait for each other when an operand was packed and at the end, and with two
// of them MKL reached 44 to 103 of some 150 GFLOP/s at 128 and 256 rows. Of one thread the peak is 103 GFLOP/s; MKL
// reached 83 to 92 at 128 and 512 rows of SmolLM2's sizes, this 87 to 96 (docs/performance.md).

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "panels.hpp"
#include "stored.hpp"
#include "threads.hpp"

extern "C" {

// An operand of `lorafuse_matmul`; ctypes fills it.
struct LorafuseMatmul {
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

// Columns and steps of what is packed at a time, 288 KiB, and rows that meet it, 144 KiB of them. MKL's time over this,
// medians of 31 of one thread of an EPYC (Zen 3), y and dx of 1536 x 576 at 512 rows, sums not yet cut: 1.11 and 1.08; of
// 48 x 768 columns and steps 1.11 and 1.06, 96 x 576 1.09 and 1.06, 144 x 576 1.11 and 1.07; of 24 rows 1.11 and 1.06
// (2026-11-30, shared, in turn).
constexpr int64_t kColumns = 96;
constexpr int64_t kReduced = 768;
constexpr int64_t kBlockRows = 48;

// as many parts as are needed of at most `most` each, equal but for rounding up to multiples of `unit`
int64_t even(int64_t size, int64_t most, int64_t unit) {
  const int64_t parts = (size + most - 1) / most;
  return ((size + parts - 1) / parts + unit - 1) / unit * unit;
}

// `count` floats of a thread, which stay where they are for its next call
float* scratch(std::vector<float>& kept, int64_t count) {
  constexpr uintptr_t kLine = 64;
  kept.resize(std::max<size_t>(kept.size(), count + kLine / sizeof(float)));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(kept.data()) + kLine - 1) / kLine * kLine);
}

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

// w[start ... start + n - 1, k ... k + count - 1], decoded where it is stored
lorafuse::Strided right(const LorafuseMatmul& of, int64_t start, int64_t n, int64_t k, int64_t count) {
  const int64_t row = of.is_transposed ? k : start, column = of.is_transposed ? start : k;
  if (!of.stored) {
    const float* data = of.w + row * of.w_row + column;
    return of.is_transposed ? lorafuse::Strided{data, 1, of.w_row} : lorafuse::Strided{data, of.w_row, 1};
  }
  static thread_local std::vector<float> kept;
  const int64_t rows = of.is_transposed ? count : n, columns = of.is_transposed ? n : count;
  float* block = scratch(kept, kColumns * kReduced);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t from = of.first + (row + i) * of.w_row + column;
    of.stored->decode(from, from + columns, block + i * columns);
  }
  if (of.rounds) round_to_bf16(block, rows * columns);
  return of.is_transposed ? lorafuse::Strided{block, 1, columns} : lorafuse::Strided{block, columns, 1};
}

// y[:, start ... start + n - 1]
void of_columns(const LorafuseMatmul& of, int64_t start, int64_t n) {
  static thread_local std::vector<float> kept;
  float* y = of.y + start;
  if (of.bias) {
    for (int64_t m = 0; m < of.M; ++m) {
      float* row = y + m * of.y_row;
      for (int64_t j = 0; j < n; ++j) row[j] = (of.adds ? row[j] : 0.0f) + of.bias[start + j];
    }
  }
  const int64_t step = even(of.K, kReduced, 1);
  for (int64_t k = 0; k < of.K; k += step) {
    const int64_t count = std::min(step, of.K - k), R = k + count == of.K ? of.R : 0;
    const int64_t pitch = (count + R) * lorafuse::kPanel;
    float* panels = scratch(kept, (n + lorafuse::kPanel - 1) / lorafuse::kPanel * pitch);
    lorafuse::pack(right(of, start, n, k, count), n, count, 1.0f, panels, pitch);
    if (R) {
      const lorafuse::Strided factor{of.factor + start * of.factor_column, of.factor_column, of.factor_rank};
      lorafuse::pack(factor, n, R, of.alpha, panels + count * lorafuse::kPanel, pitch);
    }
    for (int64_t m = 0; m < of.M; m += kBlockRows) {
      lorafuse::add_panels(
          std::min(kBlockRows, of.M - m), n, y + m * of.y_row, of.y_row, {of.x + m * of.x_row + k, of.x_row, count},
          {of.narrow + m * of.narrow_row, of.narrow_row, R}, panels, pitch, k == 0 && !of.adds && !of.bias);
    }
  }
}
#endif

}  // namespace

extern "C" {

// See the top: `stored` or `w`; `bias` may be null, and R 0. M, K and N are positive, of a factor one stride is 1.
__attribute__((visibility("default"))) void lorafuse_matmul(const LorafuseMatmul* of, int threads) {
#if defined(__x86_64__)
  const int64_t of_thread = even(of->N, (of->N + threads - 1) / threads, lorafuse::kPanel);
  const int64_t step = even(of_thread, kColumns, lorafuse::kPanel), parts = (of->N + step - 1) / step;
  lorafuse::parallel(threads, parts, [&](int64_t i) {
    of_columns(*of, i * step, std::min(step, of->N - i * step));
  });
#endif
}
}

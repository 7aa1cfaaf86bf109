// wide[M, C] += alpha * narrow[M, R] factor[C, R]^T in fp32 of some columns, by AVX2 and FMA, and what packs a factor.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#define LORAFUSE_FMA __attribute__((target("avx2,fma")))

namespace lorafuse {

constexpr int kLane = 8;
// accumulators, of 16 registers: of 6 rows of two vectors 12 products a step wait for 8 loads, of 12 rows of one for 13
constexpr int kSums = 12;
constexpr int kRows = kSums / 2;
constexpr int64_t kPanel = 16;
// of panels of a factor: with 96 and 384 the same times
constexpr int64_t kAddColumns = 192;

struct Strided {
  const float* data;
  // of a column of wide, and of a rank
  int64_t column, rank;
};

// to[j, i] = alpha * from[i, j] of [rows, columns], both with elements of a row next to each other
LORAFUSE_FMA inline void transpose(
    const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns, float alpha) {
  const __m256 factor = _mm256_set1_ps(alpha);
  int64_t i = 0;
  for (; i + kLane <= rows; i += kLane) {
    int64_t j = 0;
    for (; j + kLane <= columns; j += kLane) {
      __m256 row[kLane], half[kLane];
      for (int k = 0; k < kLane; ++k) row[k] = _mm256_loadu_ps(from + (i + k) * from_row + j);
      for (int k = 0; k < kLane; k += 2) {
        half[k] = _mm256_unpacklo_ps(row[k], row[k + 1]);
        half[k + 1] = _mm256_unpackhi_ps(row[k], row[k + 1]);
      }
      for (int k = 0; k < kLane; k += 4) {
        row[k] = _mm256_shuffle_ps(half[k], half[k + 2], 0x44);
        row[k + 1] = _mm256_shuffle_ps(half[k], half[k + 2], 0xee);
        row[k + 2] = _mm256_shuffle_ps(half[k + 1], half[k + 3], 0x44);
        row[k + 3] = _mm256_shuffle_ps(half[k + 1], half[k + 3], 0xee);
      }
      for (int k = 0; k < 4; ++k) {
        const __m256 low = _mm256_permute2f128_ps(row[k], row[k + 4], 0x20);
        const __m256 high = _mm256_permute2f128_ps(row[k], row[k + 4], 0x31);
        _mm256_storeu_ps(to + (j + k) * to_row + i, _mm256_mul_ps(low, factor));
        _mm256_storeu_ps(to + (j + k + 4) * to_row + i, _mm256_mul_ps(high, factor));
      }
    }
    for (; j < columns; ++j) {
      for (int64_t k = i; k < i + kLane; ++k) to[j * to_row + k] = alpha * from[k * from_row + j];
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_row + i] = alpha * from[i * from_row + j];
  }
}

LORAFUSE_FMA inline void copy_rows(
    const float* from, int64_t from_row, float* to, int64_t to_row, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] = from[i * from_row + j];
  }
}

// wide[kCount, 16] += narrow[kCount, R] panel[R, 16]
template <int kCount>
LORAFUSE_FMA inline void add_panel(
    float* wide, int64_t wide_row, const float* narrow, int64_t narrow_row, const float* panel, int64_t R) {
  __m256 sum[kCount][2];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i) {
    sum[i][0] = _mm256_loadu_ps(wide + i * wide_row);
    sum[i][1] = _mm256_loadu_ps(wide + i * wide_row + kLane);
  }
  const float* row[kCount];
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i) row[i] = narrow + i * narrow_row;
  for (int64_t r = 0; r < R; ++r) {
    const __m256 low = _mm256_loadu_ps(panel + r * kPanel), high = _mm256_loadu_ps(panel + r * kPanel + kLane);
#pragma GCC unroll 6
    for (int i = 0; i < kCount; ++i) {
      const __m256 value = _mm256_broadcast_ss(row[i] + r);
      sum[i][0] = _mm256_fmadd_ps(value, low, sum[i][0]);
      sum[i][1] = _mm256_fmadd_ps(value, high, sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kCount; ++i) {
    _mm256_storeu_ps(wide + i * wide_row, sum[i][0]);
    _mm256_storeu_ps(wide + i * wide_row + kLane, sum[i][1]);
  }
}

LORAFUSE_FMA inline void add_rows(
    int64_t count, float* wide, int64_t wide_row, const float* narrow, int64_t narrow_row, const float* panel,
    int64_t R) {
  int64_t i = 0;
  for (; i + kRows <= count; i += kRows) {
    add_panel<kRows>(wide + i * wide_row, wide_row, narrow + i * narrow_row, narrow_row, panel, R);
  }
  wide += i * wide_row;
  narrow += i * narrow_row;
#define LORAFUSE_TAIL(n) \
  case n: return add_panel<n>(wide, wide_row, narrow, narrow_row, panel, R)
  switch (count - i) {
    LORAFUSE_TAIL(1);
    LORAFUSE_TAIL(2);
    LORAFUSE_TAIL(3);
    LORAFUSE_TAIL(4);
    LORAFUSE_TAIL(5);
  }
#undef LORAFUSE_TAIL
}

LORAFUSE_FMA inline void add_columns(
    float* wide, int64_t wide_row, int64_t M, int64_t R, const float* narrow, int64_t narrow_row, const Strided& factor,
    float alpha, int64_t start, int64_t stop) {
  std::unique_ptr<float[]> packed(new float[kAddColumns * R]);
  float edge[kRows * kPanel] = {};
  for (int64_t c = start; c < stop; c += kAddColumns) {
    const int64_t columns = std::min(kAddColumns, stop - c);
    for (int64_t j = 0; j < columns; j += kPanel) {
      float* panel = packed.get() + j * R;
      const float* from = factor.data + (c + j) * factor.column;
      const int64_t count = std::min(kPanel, columns - j);
      if (factor.rank == 1) {
        transpose(from, factor.column, panel, kPanel, count, R, alpha);
      } else {
        for (int64_t r = 0; r < R; ++r) {
          for (int64_t k = 0; k < count; ++k) panel[r * kPanel + k] = alpha * from[r * factor.rank + k];
        }
      }
    }
    for (int64_t m = 0; m < M; m += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, M - m);
      const float* of_rows = narrow + m * narrow_row;
      float* part = wide + m * wide_row + c;
      int64_t j = 0;
      for (; j + kPanel <= columns; j += kPanel) {
        add_rows(rows, part + j, wide_row, of_rows, narrow_row, packed.get() + j * R, R);
      }
      if (j < columns) {
        copy_rows(part + j, wide_row, edge, kPanel, rows, columns - j);
        add_rows(rows, edge, kPanel, of_rows, narrow_row, packed.get() + j * R, R);
        copy_rows(edge, kPanel, part + j, wide_row, rows, columns - j);
      }
    }
  }
}

}  // namespace lorafuse
#endif

// Products with a side of the rank in fp32, for CPUs with AVX2 and FMA. `wide` is [M, C], `narrow` [M, R], a `factor`
// [C, R] by any two strides, R a multiple of 8:
//
//   read    projected[M, R] = alpha * wide factor,   sums[C, R] = beta * wide^T narrow     both from one read of wide
//   add     wide[M, C] += alpha * narrow factor^T                                          R is any
//
// A library's product packs its operands for a reduction that amortizes it; here the passes over wide cost as much as the
// arithmetic. Each thread has columns of its own, cut into blocks whose factor is packed once; rows come in blocks that
// stay in the first-level cache for both products. The order of sums is fixed by sizes and the number of threads.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "rank_add.hpp"
#include "threads.hpp"

#if defined(__x86_64__)

namespace {

using namespace lorafuse;

// 18 KiB of wide that are read twice from the first-level cache. Medians of xa and (dyb, db) at [256, 4096], R 16, one
// thread of an EPYC (Zen 3): 0.78 and 1.52 ms; blocks of 96 x 96 0.89 and 1.66, 24 x 192 0.71 and 1.55, 96 x 48 1.60 and
// 1.74. (dyb, db) at [256, 1536]: 0.42 ms, 24 x 192 0.47. Prefetching changes nothing (2026-11-30, shared, in turn).
constexpr int64_t kBlockRows = 48;
constexpr int64_t kBlockColumns = 96;
// out[i, :] = scale * ((first ? 0 : out[i, :]) + sum over k of left(i, k) * right[k, :]), of kCount rows i and
// 8 kVectors columns; left is [i, k], or [k, i] when transposed. Steps are summed apart, so that errors do not add up
template <bool kTransposed, int kCount, int kVectors>
LORAFUSE_FMA inline void accumulate(
    const float* left, int64_t left_row, const float* right, int64_t right_row, float* out, int64_t out_row,
    int64_t steps, bool first, float scale) {
  __m256 sum[kCount][kVectors] = {};
  const float* row[kCount];
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) row[i] = kTransposed ? left + i : left + i * left_row;
  for (int64_t k = 0; k < steps; ++k) {
    __m256 other[kVectors];
    for (int j = 0; j < kVectors; ++j) other[j] = _mm256_loadu_ps(right + k * right_row + j * kLane);
    const int64_t step = kTransposed ? k * left_row : k;
#pragma GCC unroll 12
    for (int i = 0; i < kCount; ++i) {
      const __m256 value = _mm256_broadcast_ss(row[i] + step);
      for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm256_fmadd_ps(value, other[j], sum[i][j]);
    }
  }
  const __m256 factor = _mm256_set1_ps(scale);
#pragma GCC unroll 12
  for (int i = 0; i < kCount; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      float* to = out + i * out_row + j * kLane;
      const __m256 total = first ? sum[i][j] : _mm256_add_ps(_mm256_loadu_ps(to), sum[i][j]);
      _mm256_storeu_ps(to, _mm256_mul_ps(total, factor));
    }
  }
}

template <bool kTransposed, int kVectors>
LORAFUSE_FMA void accumulate_rows(
    int64_t count, const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
    int64_t out_row, int64_t steps, bool first, float scale) {
  constexpr int kMost = kSums / kVectors;
  const int64_t next = kTransposed ? 1 : left_row;
  for (; count >= kMost; count -= kMost, left += kMost * next, out += kMost * out_row) {
    accumulate<kTransposed, kMost, kVectors>(left, left_row, right, right_row, out, out_row, steps, first, scale);
  }
  if (kMost > 6 && count >= 6) {
    accumulate<kTransposed, 6, kVectors>(left, left_row, right, right_row, out, out_row, steps, first, scale);
    count -= 6, left += 6 * next, out += 6 * out_row;
  }
#define LORAFUSE_TAIL(n)                         \
  case n:                                        \
    return accumulate<kTransposed, n, kVectors>( \
        left, left_row, right, right_row, out, out_row, steps, first, scale)
  switch (count) {
    LORAFUSE_TAIL(1);
    LORAFUSE_TAIL(2);
    LORAFUSE_TAIL(3);
    LORAFUSE_TAIL(4);
    LORAFUSE_TAIL(5);
  }
#undef LORAFUSE_TAIL
}

// out[count, R] += left right[steps, R], as `accumulate`
template <bool kTransposed>
LORAFUSE_FMA void product(
    int64_t count, const float* left, int64_t left_row, const float* right, int64_t right_row, float* out,
    int64_t out_row, int64_t R, int64_t steps, bool first, float scale) {
  int64_t r = 0;
  for (; r + 2 * kLane <= R; r += 2 * kLane) {
    accumulate_rows<kTransposed, 2>(
        count, left, left_row, right + r, right_row, out + r, out_row, steps, first, scale);
  }
  if (r < R) {
    accumulate_rows<kTransposed, 1>(
        count, left, left_row, right + r, right_row, out + r, out_row, steps, first, scale);
  }
}

// columns of a thread: as many blocks as come out even, whole panels each
int64_t columns_of_thread(int64_t C, int threads) {
  constexpr int64_t kUnit = 3 * kPanel;
  const int64_t units = (C + kUnit - 1) / kUnit;
  return (units + threads - 1) / threads * kUnit;
}

struct Read {
  const float* wide;
  int64_t wide_row, M, C, R;
  Strided factor;
  const float* narrow;
  int64_t narrow_row;
  float* sums;
  int64_t sums_column, sums_rank;
  float beta;
};

// of columns start ... stop - 1: projected (unscaled, unless it is null) and sums
LORAFUSE_FMA void read_columns(
    const Read& of, int64_t start, int64_t stop, float* projected, int64_t projected_row, float alpha) {
  const int64_t R = of.R;
  const bool packs = projected && of.factor.rank != 1, turns = of.sums && of.sums_rank != 1;
  std::unique_ptr<float[]> packed(packs ? new float[kBlockColumns * R] : nullptr);
  std::unique_ptr<float[]> turned(turns ? new float[kBlockColumns * R] : nullptr);
  alignas(64) float tile[kBlockRows * kBlockColumns];
  for (int64_t c = start; c < stop; c += kBlockColumns) {
    const int64_t columns = std::min(kBlockColumns, stop - c);
    const float* factor = projected ? of.factor.data + c * of.factor.column : nullptr;
    if (packs) transpose(factor, of.factor.rank, packed.get(), R, R, columns, 1.0f);
    if (packs) factor = packed.get();
    float* sums = turns ? turned.get() : of.sums + c * of.sums_column;
    for (int64_t m = 0; m < of.M; m += kBlockRows) {
      const int64_t rows = std::min(kBlockRows, of.M - m);
      const float* wide = of.wide + m * of.wide_row + c;
      int64_t wide_row = of.wide_row;
      if (of.sums) {
        // rows whose pitch is a power of two share few sets of the cache, which columns would be read from
        copy_rows(wide, wide_row, tile, kBlockColumns, rows, columns);
        wide = tile;
        wide_row = kBlockColumns;
      }
      if (projected) {
        product<false>(
            rows, wide, wide_row, factor, packs ? R : of.factor.column, projected + m * projected_row, projected_row,
            R, columns, c == start, c + columns == stop ? alpha : 1.0f);
      }
      if (of.sums) {
        product<true>(
            columns, wide, wide_row, of.narrow + m * of.narrow_row, of.narrow_row, sums, turns ? R : of.sums_column,
            R, rows, m == 0, m + rows == of.M ? of.beta : 1.0f);
      }
    }
    if (turns) transpose(turned.get(), R, of.sums + c * of.sums_column, of.sums_rank, columns, R, 1.0f);
  }
}

}  // namespace
#endif

#define LORAFUSE_EXPORT __attribute__((visibility("default")))

extern "C" {

// Whether the functions below run here. With AVX-512, twice as wide, a library's products were not measured against them.
LORAFUSE_EXPORT int lorafuse_rank_runs() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !__builtin_cpu_supports("avx512f");
#else
  return 0;
#endif
}

// See the top; `projected` or `sums` may be null, with what belongs to it. Of a factor one stride is 1, and of sums.
LORAFUSE_EXPORT void lorafuse_rank_read(
    const float* wide, int64_t wide_row, int64_t M, int64_t C, int64_t R, const float* factor, int64_t factor_column,
    int64_t factor_rank, float alpha, float* projected, int64_t projected_row, const float* narrow, int64_t narrow_row,
    float beta, float* sums, int64_t sums_column, int64_t sums_rank, int threads) {
#if defined(__x86_64__)
  const Read of{wide, wide_row, M, C, R, {factor, factor_column, factor_rank}, narrow, narrow_row, sums, sums_column,
                sums_rank, beta};
  const int64_t step = columns_of_thread(C, threads), parts = (C + step - 1) / step;
  if (parts < 2) return read_columns(of, 0, C, projected, projected_row, alpha);
  // what the columns of each thread add to projected
  std::unique_ptr<float[]> partial(projected ? new float[parts * M * R] : nullptr);
  lorafuse::parallel(threads, parts, [&](int64_t i) {
    float* mine = projected ? partial.get() + i * M * R : nullptr;
    read_columns(of, i * step, std::min(C, (i + 1) * step), mine, R, 1.0f);
  });
  if (!projected) return;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t r = 0; r < R; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < parts; ++i) sum += partial[(i * M + m) * R + r];
      projected[m * projected_row + r] = alpha * sum;
    }
  }
#endif
}

// See the top; of a factor one stride is 1.
LORAFUSE_EXPORT void lorafuse_rank_add(
    float* wide, int64_t wide_row, int64_t M, int64_t C, int64_t R, const float* narrow, int64_t narrow_row,
    const float* factor, int64_t factor_column, int64_t factor_rank, float alpha, int threads) {
#if defined(__x86_64__)
  const int64_t step = columns_of_thread(C, threads), parts = (C + step - 1) / step;
  lorafuse::parallel(threads, parts, [&](int64_t i) {
    add_columns(
        wide, wide_row, M, R, narrow, narrow_row, {factor, factor_column, factor_rank}, alpha, i * step,
        std::min(C, (i + 1) * step));
  });
#endif
}
}

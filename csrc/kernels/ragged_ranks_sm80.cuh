// The products of experts' rows with the rank, each in one read of the rows where they lie, deterministic:
//
//   projected[s] = wide[source(s)] b[g]     outer[g] = scale · Σ_s wide[source(s)]ᵀ narrow[s]     s of group g
//
// In backward wide is dout or du, b is b and narrow xa: dyb and db. Either alone is xa of forward or da. wide [., C],
// b [G, C, R], narrow and projected [rows, R], outer [G, C, R] or [G, R, C]; source(s) = order[s] / choices, or s.
//
// A block has BLOCK_N columns of one group, and walks its rows 64 at a time: it keeps outer in registers and writes it
// once, and writes fp32 partial sums of projected, which the second kernel of reduce_sm80.cuh adds in the order of the
// columns. A row's 512 bytes are copied by one warp, whose lanes hold where its next eight rows lie: these are read a
// step ahead. A group without rows is written as zeros. Blocks are as many as groups times column blocks, and the
// hardware hands them out: the longest takes as long as the largest group.
//
// Fused: both sums, the gather. FLOPs: 2 rows C R each. Bytes: 2 rows C of wide, b and outer once, and of projected
// 8 R rows C / BLOCK_N of partials: at R = 16 and 256 columns a quarter of wide.
//
// Shared memory: two stages of 64 rows, and b; two blocks an SM, of which one copies while the other multiplies.
#pragma once

#include "reduce_sm80.cuh"

namespace lorafuse::skinny {

struct RaggedReduce {
  // M, C, R, b and right (narrow) of all groups, pitch, column_blocks, rank_tiles, rows (partials of projected)
  Reduce reduce;
  const int64_t* offsets;
  const int64_t* order;  // null: rows of wide are in order
  int choices;
};

template <class T, int RANKS>
struct RaggedShape {
  static constexpr int BLOCK_M = 64, BLOCK_N = 256, kStages = 2;
  // of a warp: as in ReduceShape
  static constexpr int WARP_N = BLOCK_N / kWarps;
  static constexpr int kParts = kWarps / (BLOCK_M / 16);
  static constexpr int PART_N = BLOCK_N / kParts;
  using Wide = SharedTile<T, BLOCK_M, BLOCK_N>;
  using Narrow = SharedTile<T, BLOCK_M, RANKS>;
  using B = SharedTile<T, BLOCK_N, RANKS>;
  static constexpr int kStageBytes = Wide::kBytes + Narrow::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + B::kBytes;
  // where a warp copies whole rows; and what smaller GPUs give a block
  static_assert(Wide::kChunks == 32 && BLOCK_M / kWarps == 8 && kSharedBytes <= 99 * 1024);
  static_assert((kParts - 1) * kPartBytes<BLOCK_M, RANKS> <= kStageBytes);
};

template <class T, int RANKS>
LF_KERNEL_SHARED(kThreads, 2) ragged_ranks_kernel(const RaggedReduce p) {
  using S = RaggedShape<T, RANKS>;
  constexpr int kRowsOfWarp = S::BLOCK_M / kWarps;
  const Reduce& of = p.reduce;
  LF_DYNAMIC_SHARED(shared);
  uint8_t* const b_tile = shared + S::kStages * S::kStageBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int part = warp % S::kParts, part_row = warp / S::kParts * 16;
  // blocks that differ in ranks alone run side by side, so that all but one find `wide` in L2
  const int item = static_cast<int>(blockIdx.x) / of.rank_tiles;
  const int rank = static_cast<int>(blockIdx.x) % of.rank_tiles * RANKS;
  const int group = item / of.column_blocks, i_column = item % of.column_blocks;
  const int64_t column = static_cast<int64_t>(i_column) * S::BLOCK_N;
  const int begin = group == 0 ? 0 : static_cast<int>(ptx::load_global(p.offsets + group - 1));
  const int end = static_cast<int>(ptx::load_global(p.offsets + group));
  const int steps = end > begin ? ceil_div(end - begin, S::BLOCK_M) : 0;

  // Of the rows that this warp copies in a step, 8 apart, the one of this lane, of lanes 0 to 7; -1: none.
  const auto source = [&](int step) {
    const int row = begin + step * S::BLOCK_M + warp + lane % kRowsOfWarp * kWarps;
    if (row >= end) return -1;
    return p.order == nullptr ? row : static_cast<int>(ptx::load_global(p.order + row)) / p.choices;
  };
  int next = source(0);
  const auto fetch = [&](int step) {
    if (step < steps) {
      uint8_t* stage = shared + step % S::kStages * S::kStageBytes;
      const int64_t first = column + lane * 8, left = of.C - first;
      const int bytes = left <= 0 ? 0 : left < 8 ? static_cast<int>(left) * 2 : kChunkBytes;
      LF_UNROLL
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = ptx::shuffle(next, i);
        const T* from = static_cast<const T*>(of.left) + (row < 0 ? 0 : row) * of.stride_left + first;
        ptx::copy_async(stage + chunk_offset<S::Wide::kChunks>(warp + i * kWarps, lane), from, row < 0 ? 0 : bytes);
      }
      if (of.right) {
        S::Narrow::copy(stage + S::Wide::kBytes, static_cast<const T*>(of.right), of.stride_right,
                        begin + step * S::BLOCK_M, end, rank, of.R);
      }
      next = source(step + 1);
    }
    // an empty group past the end, so that the wait counts the same
    ptx::copy_async_commit();
  };

  // with the first rows, and read when these are
  if (of.b && steps > 0) {
    const T* b = static_cast<const T*>(of.b) + group * of.C * of.stride_b;
    S::B::copy(b_tile, b, of.stride_b, column, of.C, rank, of.R);
  }
  Accumulator<RANKS> columns[S::WARP_N / 16] = {};
  fetch(0);
  LF_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    uint8_t* wide = shared + step % S::kStages * S::kStageBytes;
    const uint8_t* narrow = wide + S::Wide::kBytes;
    ptx::copy_async_wait<0>();
    // every warp is done with the stage before, which is written again
    ptx::block_sync();
    fetch(step + 1);

    if (of.right) {
      LF_UNROLL
      for (int k = 0; k < S::BLOCK_M; k += 16) {
        uint32_t b[RANKS / 16][4];
        LF_UNROLL
        for (int n = 0; n < RANKS / 16; ++n) fragment_rows_first<RANKS>(b[n], narrow, k, 16 * n, true);
        LF_UNROLL
        for (int i = 0; i < S::WARP_N / 16; ++i) {
          uint32_t a[4];
          fragment_columns_first<S::BLOCK_N>(a, wide, k, warp * S::WARP_N + i * 16, true);
          multiply<T, RANKS>(columns[i], a, b);
        }
      }
    }
    if (of.b) {
      Accumulator<RANKS> sums[1] = {};
      LF_UNROLL
      for (int k = 0; k < S::PART_N; k += 16) {
        uint32_t a[4], b[RANKS / 16][4];
        fragment_rows_first<S::BLOCK_N>(a, wide, part_row, part * S::PART_N + k, false);
        LF_UNROLL
        for (int n = 0; n < RANKS / 16; ++n) {
          fragment_rows_first<RANKS>(b[n], b_tile, part * S::PART_N + k, 16 * n, true);
        }
        multiply<T, RANKS>(sums[0], a, b);
      }
      // the parts take the place of `wide`, once every warp has read it
      ptx::block_sync();
      add_parts<S::kParts, S::BLOCK_M, RANKS>(sums, wide, part, part_row);
      LF_UNROLL
      for (int i = 0; i < RANKS / 4; ++i) {
        const int n = i / 2, half = i % 2, c = rank + fragment_column(n);
        const int64_t m = begin + step * S::BLOCK_M + part_row + fragment_row(half);
        if (part > 0 || m >= end || c >= of.R) continue;
        float* place = of.rows + (i_column * of.M + m) * of.pitch + c;
        ptx::store_global(reinterpret_cast<Pair*>(place), Pair{sums[0][n][2 * half], sums[0][n][2 * half + 1]});
      }
    }
  }

  if (!of.right) return;
  LF_UNROLL
  for (int i = 0; i < S::WARP_N / 8 * RANKS / 8; ++i) {
    const int j = i % (RANKS / 8), half = i / (RANKS / 8) % 2, block = i / (RANKS / 8) / 2;
    const int64_t n = column + warp * S::WARP_N + block * 16 + fragment_row(half), c = rank + fragment_column(j);
    if (n >= of.C || c >= of.R) continue;
    const int64_t step = of.transposed ? of.C : 1;
    const int64_t place = group * of.C * of.R + (of.transposed ? c * of.C + n : n * of.R + c);
    store_result<T>(of.columns_out, place, of.scale * columns[block][j][2 * half], of.columns_fp32);
    store_result<T>(of.columns_out, place + step, of.scale * columns[block][j][2 * half + 1], of.columns_fp32);
  }
}

}  // namespace lorafuse::skinny

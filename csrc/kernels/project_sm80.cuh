// xa = drop(x) aᵀ, the low-rank projection, in one pass over x; and concurrently an adapter rounded for the product after it.
//
// Shapes: x [M, K], a [R, K] (fp32 is rounded to x's type on its way to the registers), xa [M, R] and zeros up to its
// stride. The mask of dropout is that of lorafuse/philox.py, drawn in place, one Philox call for four elements.
//
// Fused: rounding of a, the mask, padding. FLOPs: 2 M K R. Bytes: 2 M K of x once from memory, 2 M R written; a comes
// from L2 once for each block of rows, so that an SM takes in 1 + R / BLOCK_M times its x (twice R with a in fp32).
//
// A block owns BLOCK_M rows and RANKS ranks and walks K. Its eight warps are kParts groups along K of a stage and add
// their accumulators at the end: no partial sum leaves the block. BLOCK_M is 64, or 16 where 64 would leave SMs idle.
// In 64 × 128 stages two 32-row fragments share one of a. Through shared memory go x twice (in, and out as fragments)
// and a three times (in, and out for two groups of rows): at R = 16 in 16 bits 2 · 16 + 3 · 4 KB a stage, 350 clocks at
// 128 bytes, 47 bytes of x a clock; at R = 64 2 · 16 + 3 · 16 KB, 26 a clock. An H200 brings 21.
//
// Ranks above 64 take several blocks, which run side by side so that all but one find x in L2. Blocks past those round
// the adapter, if there is one (round_sm80.cuh).
#pragma once

#include "round_sm80.cuh"

namespace lorafuse::skinny {

template <class T, class A, int BLOCK_M, int RANKS>
struct ProjectShape {
  static constexpr int BLOCK_K = BLOCK_M == 16 && sizeof(A) == 2 ? 256 : 128;
  static constexpr int WARP_M = BLOCK_M < 32 ? BLOCK_M : 32;
  static constexpr int kParts = kWarps / (BLOCK_M / WARP_M);
  static constexpr int PART_K = BLOCK_K / kParts;
  using X = SharedTile<T, BLOCK_M, BLOCK_K>;
  using Adapter = SharedTile<A, RANKS, BLOCK_K>;
  static constexpr int kStageBytes = X::kBytes + Adapter::kBytes;
  // a tall block is alone on its SM and keeps more in flight, within the 99 KB of smaller GPUs; of flat ones two fit
  // an SM of an A100 (164 KB) where three stages allow it
  static constexpr int kFit = (BLOCK_M == 64 ? 96 : 80) * 1024 / kStageBytes;
  static constexpr int kStages = kFit < 3 ? 3 : kFit > 6 ? 6 : kFit;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kBlocks = kSharedBytes > 112 * 1024 ? 1 : 2;
  static_assert(PART_K % 16 == 0 && (kParts - 1) * kPartBytes<BLOCK_M, RANKS> <= kSharedBytes);
};

// b of two column blocks from 16 ranks, as fragment_columns_first gives it, at (rank, column) of a tile of `a`.
template <class T, class A, int BLOCK_K>
LF_DEVICE void adapter_fragment(uint32_t (&values)[4], const uint8_t* tile, int rank, int column) {
  if constexpr (sizeof(A) == 2) {
    fragment_columns_first<BLOCK_K>(values, tile, rank, column, false);
  } else {
    LF_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int r = rank + i / 2 * 8 + fragment_row(0), c = column + fragment_column(i % 2);
      const uint8_t* place = tile + chunk_offset<BLOCK_K / 4>(r, c / 4) + c % 4 * 4;
      const Pair pair = ptx::load_shared<Pair>(place);
      values[i] = ptx::pack<T>(pair.first, pair.second);
    }
  }
}

template <class T, class A, int BLOCK_M, int RANKS>
LF_KERNEL_SHARED(kThreads, (ProjectShape<T, A, BLOCK_M, RANKS>::kBlocks)) project_kernel(const ProjectX p) {
  using S = ProjectShape<T, A, BLOCK_M, RANKS>;
  // the product that takes xa sets itself up meanwhile; it reads xa and writes only after this launch is complete
  ptx::let_next_launch_start();
  LF_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int part = warp % S::kParts, warp_row = warp / S::kParts * S::WARP_M;
  const int rank_tiles = static_cast<int>(ceil_div<int64_t>(p.R, RANKS));
  const int64_t past = static_cast<int64_t>(blockIdx.x) - ceil_div<int64_t>(p.M, BLOCK_M) * rank_tiles;
  if (past >= 0) {
    round_chunk<T>(p.rounded, past * kThreads + thread);
    return;
  }
  const int i_r = static_cast<int>(blockIdx.x) % rank_tiles, rank = i_r * RANKS;
  const int64_t row = static_cast<int64_t>(blockIdx.x) / rank_tiles * BLOCK_M;
  const int steps = static_cast<int>(ceil_div<int64_t>(p.K, S::BLOCK_K));
  const uint64_t seed = p.seed ? static_cast<uint64_t>(ptx::load_global(p.seed)) : 0;

  const auto fetch = [&](int step) {
    if (step < steps) {
      uint8_t* stage = shared + step % S::kStages * S::kStageBytes;
      const int64_t column = static_cast<int64_t>(step) * S::BLOCK_K;
      S::X::copy(stage, static_cast<const T*>(p.x), p.stride_x, row, p.M, column, p.K);
      S::Adapter::copy(stage + S::X::kBytes, static_cast<const A*>(p.a), p.stride_a, rank, p.R, column, p.K);
    }
    // an empty group past the end, so that the wait counts the same
    ptx::copy_async_commit();
  };

  Accumulator<RANKS> acc[S::WARP_M / 16] = {};
  for (int step = 0; step < S::kStages - 1; ++step) fetch(step);
  LF_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    uint8_t* x = shared + step % S::kStages * S::kStageBytes;
    ptx::copy_async_wait<S::kStages - 2>();
    if (p.seed) S::X::drop(x, seed, p.drop_below, row, p.M, static_cast<int64_t>(step) * S::BLOCK_K, p.K);
    ptx::block_sync();
    fetch(step + S::kStages - 1);

    LF_UNROLL
    for (int k = 0; k < S::PART_K; k += 16) {
      const int column = part * S::PART_K + k;
      uint32_t b[RANKS / 16][4];
      LF_UNROLL
      for (int n = 0; n < RANKS / 16; ++n) {
        adapter_fragment<T, A, S::BLOCK_K>(b[n], x + S::X::kBytes, 16 * n, column);
      }
      LF_UNROLL
      for (int block = 0; block < S::WARP_M / 16; ++block) {
        uint32_t a[4];
        fragment_rows_first<S::BLOCK_K>(a, x, warp_row + block * 16, column, false);
        multiply<T, RANKS>(acc[block], a, b);
      }
    }
  }

  ptx::block_sync();
  add_parts<S::kParts, BLOCK_M, RANKS>(acc, shared, part, warp_row);
  T* xa = static_cast<T*>(p.xa) + row * p.stride_xa;
  const int rows = p.M - row < BLOCK_M ? static_cast<int>(p.M - row) : BLOCK_M;
  if (part == 0) {
    LF_UNROLL
    for (int i = 0; i < S::WARP_M / 16 * RANKS / 4; ++i) {
      const int block = i / (RANKS / 4), n = i / 2 % (RANKS / 8), half = i % 2;
      const int r = warp_row + block * 16 + fragment_row(half), c = rank + fragment_column(n);
      if (r >= rows || c >= p.stride_xa) continue;
      const float low = c < p.R ? acc[block][n][2 * half] : 0.0f;
      const float high = c + 1 < p.R ? acc[block][n][2 * half + 1] : 0.0f;
      ptx::store_global(reinterpret_cast<uint32_t*>(xa + r * p.stride_xa + c), ptx::pack<T>(low, high));
    }
  }
  if (i_r == rank_tiles - 1 && p.stride_xa > rank + RANKS) {
    const int chunks = static_cast<int>(p.stride_xa - rank - RANKS) / 8;
    for (int i = thread; i < rows * chunks; i += kThreads) {
      T* place = xa + i / chunks * p.stride_xa + rank + RANKS + i % chunks * 8;
      ptx::store_global(reinterpret_cast<Chunk*>(place), Chunk{});
    }
  }
}

}  // namespace lorafuse::skinny

// y = x wᵀ + bias + scale · xa bᵀ and xa = x aᵀ in one launch, for few tiles: a cluster computes each (sm_90a).
//
// Where tiles are fewer than half of the SMs, the others help: the blocks of a cluster multiply one part of K each, for
// all columns of a tile and for kRanks columns of a beside them. xa is linear in K as y is, so that no block waits for
// another before its main loop ends. Then each block adds up a part of the rows, from the shared memory of all blocks
// of the cluster, in the order of their ranks: first xa, which is rounded to T as it is stored, then y, to which it adds
// xa bᵀ by ordinary arithmetic, 4 M N R FLOPs of fp32 spread over all threads. Nothing else is launched: the three
// warps of a block that load nothing round its part of a into the stages of the ring, and b is rounded where it is read.
//
// FLOPs 2 M N (K + R) + 2 M K R for each column of tiles. Bytes: x, w, y, xa once from memory where L2 holds what tiles
// share; the accumulators of a tile, 4 bytes an element, once through shared memory to another block.
#pragma once

#include <lorafuse/ptx/cluster.cuh>

#include "linear_sm90.cuh"
#include "skinny_sm80.cuh"

namespace lorafuse::sm90 {

constexpr int kSplitColumns = 128;
// 128 · 88 + 256 · 200 of the 64512 registers of the launch: producers hold a K-block of a
constexpr int kSplitProducerRegisters = 88;
constexpr int kSplitConsumerRegisters = 200;

struct SplitArguments {
  int M, N, K, R, k_blocks;
  TileOrder order;
  int stages, cluster;
  const void* bias;
  const void* a;  // [R, K]
  int64_t stride_a;
  const void* b;  // [N, R]
  int64_t stride_b;
  bool a_fp32, b_fp32;
  float scale;
  void* xa;
  int64_t stride_xa;
  void* y;
  int64_t stride_y;
};

// Behind the shared memory of SharedPlan, on a 1024-byte boundary: a box of a for each stage. The parts of the sums lie
// where the ring was, rows of y with a pitch that spreads them over the banks; the part's own xa behind them.
template <int kRanks>
struct SplitPlan {
  using Plan = SharedPlan<BLOCK_M, kSplitColumns>;
  static constexpr int kABytes = kRanks * kBoxRowBytes;
  static constexpr int kPitch = kSplitColumns + 8;
  static constexpr int kPartFloats = BLOCK_M * kPitch, kXaFloats = BLOCK_M * kRanks;

  LF_HOST_DEVICE static constexpr int a(int stages) { return round_up(Plan::bytes(stages) - 1024, 1024); }
  LF_HOST_DEVICE static constexpr int bytes(int stages) { return 1024 + a(stages) + stages * kABytes; }
  // of the ring, before its barriers
  LF_HOST_DEVICE static constexpr bool fits(int stages) {
    return (kPartFloats + 2 * kXaFloats) * 4 <= stages * Plan::kStageBytes + Plan::kOutputBytes;
  }
};

// Eight elements of a row of an adapter from `column` on, rounded to T; zeros outside.
template <class T, class In>
LF_DEVICE skinny::Chunk rounded_chunk(const In* row, int column, int columns) {
  constexpr int kChunks = static_cast<int>(sizeof(In)) / 2;
  skinny::Chunk chunk{};
  if (column >= columns) return chunk;
  if constexpr (kChunks == 1) {
    return ptx::load_global(reinterpret_cast<const skinny::Chunk*>(row + column));
  } else {
    struct alignas(16) Quad {
      float values[4];
    };
    LF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Quad quad = ptx::load_global(reinterpret_cast<const Quad*>(row + column) + i);
      chunk.words[2 * i] = ptx::pack<T>(quad.values[0], quad.values[1]);
      chunk.words[2 * i + 1] = ptx::pack<T>(quad.values[2], quad.values[3]);
    }
    return chunk;
  }
}

// A warp: every third K-block of a from `first` to `end`, into the stages of the ring.
template <class T, class In, int kRanks>
LF_DEVICE void round_blocks(Pipeline<BLOCK_M, kSplitColumns>& pipeline, const SplitArguments& p, uint8_t* boxes,
                            int first, int end, int warp, int lane) {
  constexpr int kChunks = kRanks * 8 / 32;
  LF_NO_UNROLL
  for (int block = first; block < end; ++block) {
    if ((block - first) % 3 == warp - 1) {
      skinny::Chunk chunks[kChunks];
      LF_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        const int rank = i * 4 + lane / 8;
        const In* row = static_cast<const In*>(p.a) + rank * p.stride_a;
        chunks[i] = rounded_chunk<T>(row, block * BLOCK_K + lane % 8 * 8, rank < p.R ? p.K : 0);
      }
      ptx::mbarrier_wait(pipeline.empty(), pipeline.parity ^ 1);
      uint8_t* box = boxes + pipeline.stage * SplitPlan<kRanks>::kABytes;
      LF_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        ptx::store_shared(box + box_offset(i * 4 + lane / 8, lane % 8 * 8), chunks[i]);
      }
      ptx::fence_proxy_async_shared();
      ptx::warp_sync();
      if (lane == 0) ptx::mbarrier_arrive(pipeline.full());
    }
    pipeline.advance();
  }
}

// scale · b of column n and rank r as the other kernels read it, 0 from R on.
template <class T>
LF_DEVICE float rounded_b(const SplitArguments& p, int n, int r) {
  if (r >= p.R) return 0.0f;
  const int64_t at = n * p.stride_b + r;
  const float value = p.b_fp32 ? ptx::load_global(static_cast<const float*>(p.b) + at)
                               : ptx::to_float(ptx::load_global(static_cast<const T*>(p.b) + at));
  return ptx::to_float(ptx::from_float<T>(p.scale * value));
}

template <class T, int kRankSteps>
LF_KERNEL(kThreads)
split_kernel(LF_GRID_CONSTANT LinearMaps maps, LF_GRID_CONSTANT SplitArguments p) {
  constexpr int BLOCK_N = kSplitColumns, kRanks = kRankSteps * kStepElements;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  using Parts = SplitPlan<kRanks>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, 1);
  uint8_t* const boxes = pipeline.base + Parts::a(p.stages);
  const int rank = static_cast<int>(ptx::cluster_rank());
  const int warp = ptx::shuffle(static_cast<int>(threadIdx.x) / 32, 0), lane = threadIdx.x % 32;
  // not start_block, with which ptxas keeps four bytes in local memory (nvcc 13.0)
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stages; ++s) {
      // TMA's thread, and the warp that writes a
      ptx::mbarrier_init(pipeline.full() + s, 2);
      ptx::mbarrier_init(pipeline.empty() + s, 8);
    }
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch(&maps.x);
    ptx::tma_prefetch(&maps.w);
  }
  // this launch may have started while the one before it ends
  ptx::wait_for_previous_launch();
  // the barriers are there, and so are the other blocks
  ptx::warp_sync();
  ptx::cluster_sync();

  const Tile tile = p.order.at(static_cast<int>(blockIdx.x) / p.cluster);
  const int row = tile.row * BLOCK_M, column = tile.column * BLOCK_N;
  const int first = rank * p.k_blocks / p.cluster, end = (rank + 1) * p.k_blocks / p.cluster;
  float* const parts = reinterpret_cast<float*>(pipeline.base);
  float* const xa_parts = parts + Parts::kPartFloats;
  float* const xa_whole = xa_parts + Parts::kXaFloats;
  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kSplitProducerRegisters>();
    if (warp > 0) {
      if (p.a_fp32) {
        round_blocks<T, float, kRanks>(pipeline, p, boxes, first, end, warp, lane);
      } else {
        round_blocks<T, T, kRanks>(pipeline, p, boxes, first, end, warp, lane);
      }
    } else if (ptx::elect_one()) {
      // TMA reads what the launch before has written
      ptx::fence_proxy_async();
      LF_NO_UNROLL
      for (int block = first; block < end; ++block) {
        pipeline.acquire(Plan::kStageBytes);
        ptx::tma_load(pipeline.a(), &maps.x, block * BLOCK_K, row, pipeline.full());
        ptx::tma_load(pipeline.b(), &maps.w, block * BLOCK_K, column, pipeline.full());
        pipeline.advance();
      }
      ptx::let_next_launch_start();
    }
    // for the parts of all blocks, and until nobody reads this one's; each role on its own, which has its own registers
    ptx::warp_sync();
    ptx::cluster_sync();
    ptx::cluster_sync();
  } else {
    // ---- consumers
    ptx::registers_increase<kSplitConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    float d[BLOCK_N / 2], xa[kRanks / 2];
    LF_NO_UNROLL
    for (int block = first; block < end; ++block) {
      begin_stage(pipeline);
      const uint8_t* x = pipeline.a() + part.row * kBoxRowBytes;
      multiply<T, BLOCK_N, Major::K, kStepsOfBlock>(d, x, pipeline.b(), block > first);
      multiply<T, kRanks, Major::K, kStepsOfBlock>(xa, x, boxes + pipeline.stage * Parts::kABytes, block > first);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      // the ring is this block's own, whatever its rank
      const int previous = (pipeline.stage == 0 ? p.stages : pipeline.stage) - 1;
      if (block > first && lane == 0) ptx::mbarrier_arrive(pipeline.empty() - pipeline.stage + previous);
      pipeline.advance();
    }
    ptx::wgmma_wait<0>();
    // the ring is read by nobody now
    consumers_sync();
    LF_UNROLL
    for (int i = 0; i < BLOCK_N / 2; i += 2) {
      const int r = part.row + fragment_row(thread, i), c = fragment_column(thread, i);
      ptx::store_shared(parts + r * Parts::kPitch + c, skinny::Pair{d[i], d[i + 1]});
    }
    LF_UNROLL
    for (int i = 0; i < kRanks / 2; i += 2) {
      const int r = part.row + fragment_row(thread, i), c = fragment_column(thread, i);
      ptx::store_shared(xa_parts + r * kRanks + c, skinny::Pair{xa[i], xa[i + 1]});
    }
    // the parts of all blocks are there
    ptx::warp_sync();
    ptx::cluster_sync();
    const int rows = BLOCK_M / p.cluster, top = rank * rows, worker = threadIdx.x - 128;
    LF_NO_UNROLL
    for (int i = worker; i < rows * kRanks; i += 256) {
      const int r = top + i / kRanks, at = r * kRanks + i % kRanks;
      float sum = 0.0f;
      for (int block = 0; block < p.cluster; ++block) sum += ptx::load_cluster(xa_parts + at, block);
      const T rounded = ptx::from_float<T>(sum);
      ptx::store_shared(xa_whole + at, ptx::to_float(rounded));
      if (column == 0 && row + r < p.M && i % kRanks < round_up(p.R, 8)) {
        ptx::store_global(static_cast<T*>(p.xa) + (row + r) * p.stride_xa + i % kRanks, rounded);
      }
    }
    // xa of these rows is whole
    consumers_sync();
    const int c = worker % 32 * 4, n = column + c;
    if (n < p.N) {
      float b[4][kRanks], bias[4] = {};
      LF_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (p.bias != nullptr) bias[j] = ptx::to_float(ptx::load_global(static_cast<const T*>(p.bias) + n + j));
        LF_UNROLL
        for (int r = 0; r < kRanks; ++r) b[j][r] = rounded_b<T>(p, n + j, r);
      }
      LF_NO_UNROLL
      for (int r = top + worker / 32; r < top + rows && row + r < p.M; r += 8) {
        float y[4];
        LF_UNROLL
        for (int j = 0; j < 4; ++j) {
          y[j] = 0.0f;
          for (int block = 0; block < p.cluster; ++block) {
            y[j] += ptx::load_cluster(parts + r * Parts::kPitch + c + j, block);
          }
          LF_UNROLL
          for (int k = 0; k < kRanks; ++k) y[j] += ptx::load_shared<float>(xa_whole + r * kRanks + k) * b[j][k];
          y[j] += bias[j];
        }
        uint32_t* const out = reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + (row + r) * p.stride_y + n);
        ptx::store_global(out, ptx::pack<T>(y[0], y[1]));
        ptx::store_global(out + 1, ptx::pack<T>(y[2], y[3]));
      }
    }
    // no block ends while others read its parts
    ptx::warp_sync();
    ptx::cluster_sync();
  }
}

}  // namespace lorafuse::sm90

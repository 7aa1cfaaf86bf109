// y = x wᵀ + bias + xa bᵀ and dx = dy w + mask ⊙ (dyb a), one persistent kernel for both directions (sm_90a).
//
// In the forward's names: x [M, K], w [N, K] (as stored; [K, N] in the backward, where K is the layer's N), xa [M, R],
// b [N, R] ([R, N] in the backward), y [M, N]; 16-bit elements, fp32 accumulators.
// Fused: the low-rank product is more reduction, [x | xa] [w | b]ᵀ, in the same ring of stages and the same
// accumulators: after the K-blocks of x and w come those of xa and b, zero-filled by TMA to 64 ranks, of which the last
// issues ceil(R / 16) steps. Bias in the epilogue. Nothing is saved but xa.
// FLOPs 2 M N (K + R). Bytes: x, w, y and xa once from memory where L2 holds what tiles share.
//
// Form::kForward         xa is there, or was written by the launch before, which this one may overlap.
// Form::kDx              w and b are read with their columns contiguous (MN-major).
// Form::kDxAdapterGrads  the same, and some blocks sum da and db before their tiles (adapter_grads_sm90.cuh).
// Form::kDxDropout       the low-rank product comes first and is masked in its accumulators, to which dy w is added.
//
// Clusters draw their tiles by ticket (tickets_sm90.cuh). Tiles of their own, one of each wave, would take as long where
// the GPU is theirs alone; where another kernel holds some SMs, the blocks that start late would begin with all of
// theirs (615 us where tickets take 405, simulated: bench/schedule.py). The sum of a tile is the same whoever computes
// it, so that results are bit for bit those of any other order.
//
// Roles: pipeline_sm90.cuh. The way out: epilogue_sm90.cuh. Host: linear_launch_sm90.cuh.
#pragma once

#include <lorafuse/schedule.cuh>

#include "adapter_grads_sm90.cuh"
#include "epilogue_sm90.cuh"
#include "tickets_sm90.cuh"

namespace lorafuse::sm90 {

enum class Form { kForward, kDx, kDxAdapterGrads, kDxDropout };

constexpr int BLOCK_M = 128;

template <Form kForm>
constexpr Major kMajorOfB = kForm == Form::kForward ? Major::K : Major::MN;

struct LinearMaps {
  TensorMap x, w, xa, b, a, y;
  SumMaps sums[2];
};

struct LinearArguments {
  int M, N, R;
  int k_blocks;     // of x and w
  int rank_blocks;  // of xa and b
  TileOrder order;
  int stages, cluster;
  const void* bias;
  bool overlap_previous;
  uint32_t* workspace;  // its first word counts the tiles that were drawn
  // launches that compute xa (xa_items_sm90.cuh)
  void* xa;
  int64_t stride_xa;
  // kDxAdapterGrads: db and da, by the first blocks
  int sum_blocks;
  Sum sums[2];
  // kDxDropout
  const int64_t* seed;
  uint32_t drop_below;
};

template <class T, int BLOCK_N, int kRankSteps, Form kForm>
LF_KERNEL(kThreads)
linear_kernel(LF_GRID_CONSTANT LinearMaps maps, LF_GRID_CONSTANT LinearArguments p) {
  constexpr Major kMajorB = kMajorOfB<kForm>;
  constexpr bool kSums = kForm == Form::kDxAdapterGrads;
  constexpr bool kDropout = kForm == Form::kDxDropout;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, p.cluster);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages), p.cluster);
  const int rank = p.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const int warp = start_block(maps.x, maps.w, [&] {
    pipeline.initialize();
    tickets.initialize();
  });

  const int tiles = p.order.tiles(), programs = static_cast<int>(gridDim.x) / p.cluster;
  // Blocks that sum first have the lowest numbers and so start first: their work is as long as that of many tiles.
  const int number = static_cast<int>(blockIdx.x);
  const bool sums = kSums && number < p.sum_blocks;
  const auto first_row_block = [&](int row) { return row * p.cluster + rank; };

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      bool overlaps = p.overlap_previous;
      const auto wait_for_previous = [&] {
        if (overlaps) {
          ptx::wait_for_previous_launch();
          ptx::fence_proxy_async();
        }
        overlaps = false;
      };
      if constexpr (kSums) {
        if (sums) {
          wait_for_previous();
          for_each_item<BLOCK_N>(p.sums, number, p.sum_blocks,
                                 [&](int sum, int column) { load_item(pipeline, maps.sums[sum], 0, p.M, column); });
        }
      }
      const auto draw = [&] { return rank == 0 ? static_cast<int>(ptx::fetch_add_relaxed(p.workspace, 1)) : 0; };
      int next = draw();
      for (int index = tickets.pass(next, rank); index < tiles; index = tickets.pass(next, rank)) {
        const Tile tile = p.order.at(index);
        const int row_block = first_row_block(tile.row), column = tile.column * BLOCK_N;
        const auto load_blocks = [&](const TensorMap* map_a, const TensorMap* map_b, int blocks) {
          for (int block = 0; block < blocks; ++block) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), map_a, block * BLOCK_K, row_block * BLOCK_M, pipeline.full());
            load_b<kMajorB>(pipeline, map_b, block * BLOCK_K, column, rank);
            pipeline.advance();
          }
        };
        const auto load_ranks = [&] {
          wait_for_previous();
          load_blocks(&maps.xa, &maps.b, p.rank_blocks);
        };
        if constexpr (kDropout) load_ranks();
        load_blocks(&maps.x, &maps.w, p.k_blocks);
        // comes while the ring is still full
        next = draw();
        if constexpr (!kDropout && kRankSteps > 0) load_ranks();
      }
      if (rank == 0 && is_last_number(next, tiles, programs)) ptx::store_relaxed(p.workspace, 0);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    if constexpr (kSums) {
      if (sums) {
        for_each_item<BLOCK_N>(p.sums, number, p.sum_blocks, [&](int sum, int column) {
          const auto store = [&](int64_t place, float value) { store_sum<T>(p.sums[sum], place, value); };
          float d[BLOCK_N / 2];
          sum_item<T>(d, pipeline, p.sums[sum], 0, p.M, p.R, column, consumer, thread, store);
        });
        // what consumer 1 has summed was read, where its first tile goes out
        consumers_sync();
      }
    }
    for (int index = tickets.take(lane); index < tiles; index = tickets.take(lane)) {
      const Tile tile = p.order.at(index);
      const int row = first_row_block(tile.row) * BLOCK_M + part.row, column = tile.column * BLOCK_N;
      float d[BLOCK_N / 2];
      const auto multiply_blocks = [&](int blocks, bool accumulate) {
        for (int block = 0; block < blocks; ++block) {
          multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0,
                                                             accumulate || block > 0);
        }
      };
      // The last K-block of the ranks is apart, with a number of steps that is known when it is compiled: else ptxas
      // would wait for the accumulators at each step.
      if constexpr (kDropout) {
        multiply_blocks(p.rank_blocks - 1, false);
        multiply_block<T, BLOCK_N, kMajorB, kRankSteps>(d, pipeline, part, lane, p.rank_blocks > 1, p.rank_blocks > 1);
        finish_blocks(pipeline, lane);
        drop<BLOCK_N>(d, p.seed, p.drop_below, row, column, p.N, thread);
        multiply_blocks(p.k_blocks, true);
      } else {
        multiply_blocks(p.k_blocks + (kRankSteps > 0 ? p.rank_blocks - 1 : 0), false);
        if constexpr (kRankSteps > 0) {
          multiply_block<T, BLOCK_N, kMajorB, kRankSteps>(d, pipeline, part, lane, true, true);
        }
      }
      finish_blocks(pipeline, lane);

      if (p.bias != nullptr) add_bias<T, BLOCK_N>(d, static_cast<const T*>(p.bias), column, p.N, thread);
      store_tile<T, BLOCK_N>(d, &maps.y, pipeline.output(consumer), row, column, consumer, thread);
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
  end_block();
}

}  // namespace lorafuse::sm90

// y[s] = x[s] w[g] + bias[g] + xa[s] b[g] for the rows s of each group g, ragged on the device (sm_90a).
//
// x [rows, K], w [G, N, K] (w [G, K, N] transposed, for the input gradient), xa [rows, R], b [G, N, R] ([G, R, N]),
// y [rows, N]; the rows of group g are offsets[g - 1] … offsets[g], the experts' rows of a mixture-of-experts layer.
// Fused as in linear_sm90.cuh: the low-rank product is more reduction in the same accumulators; bias in the epilogue.
// FLOPs 2 rows N (K + R), and up to BLOCK_M - 1 rows a group that are multiplied and thrown away. Bytes: x, xa and y
// once, w and b of each group that has rows.
//
// A tile's rows are those of one group, from its beginning in steps of BLOCK_M, wherever that lies in x. What it reads
// behind the group's end is multiplied and not stored. The groups of w are a dimension of its tensor map, so that what
// lies behind the last column of a group reads as zero and not as the next group. No host knows how many tiles there
// are: producer and consumers of each block walk the offsets, forward only, to the tiles that the block draws by ticket
// (tickets_sm90.cuh).
//
// Roles: pipeline_sm90.cuh. The way out: epilogue_sm90.cuh. Host: grouped_launch_sm90.cuh.
#pragma once

#include <lorafuse/schedule.cuh>

#include "epilogue_sm90.cuh"
#include "tickets_sm90.cuh"

namespace lorafuse::sm90 {

struct GroupedMaps {
  TensorMap x, w, xa, b, y;
};

struct GroupedArguments {
  int rows, groups, N;
  int k_blocks, rank_blocks;
  int stages;
  const int64_t* offsets;
  const void* bias;
  void* y;
  int64_t stride_y;
  bool overlap_previous;
  uint32_t* tickets;
};

// Producer: load_b of pipeline_sm90.cuh, of group `group`.
template <Major kMajorB, int BLOCK_M, int BLOCK_N>
LF_DEVICE void load_group_b(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const TensorMap* map, int reduction, int column,
                            int group) {
  if constexpr (kMajorB == Major::K) {
    ptx::tma_load(pipeline.b(), map, reduction, column, group, pipeline.full());
  } else {
    for (int n = 0; n < BLOCK_N; n += kBoxElements) {
      ptx::tma_load(pipeline.b() + n * kBoxRowBytes, map, column + n, reduction, group, pipeline.full());
    }
  }
}

template <class T, int BLOCK_M, int BLOCK_N, int kRankSteps, bool kTransposed>
LF_KERNEL(kThreads)
grouped_kernel(LF_GRID_CONSTANT GroupedMaps maps, LF_GRID_CONSTANT GroupedArguments p) {
  constexpr Major kMajorB = kTransposed ? Major::MN : Major::K;
  constexpr int kColumns = ConsumerPart<BLOCK_M, BLOCK_N>::kColumns;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, 1);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages));
  const int warp = start_block(maps.x, maps.w, [&] {
    pipeline.initialize();
    tickets.initialize();
  });

  const auto load_end = [&](int group) { return static_cast<int>(ptx::load_global(p.offsets + group)); };
  RaggedWalk walk(p.groups, ceil_div(p.N, BLOCK_N), BLOCK_M);
  RaggedTile tile;

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      const auto draw = [&] { return static_cast<int>(ptx::fetch_add_relaxed(p.tickets, 1)); };
      bool first = true;
      int next = draw();
      for (int index = tickets.pass(next); walk.seek(index, load_end, tile); index = tickets.pass(next)) {
        const auto load_blocks = [&](const TensorMap* map_a, const TensorMap* map_b, int blocks) {
          for (int block = 0; block < blocks; ++block) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), map_a, block * BLOCK_K, tile.row, pipeline.full());
            load_group_b<kMajorB>(pipeline, map_b, block * BLOCK_K, tile.column * BLOCK_N, tile.group);
            pipeline.advance();
          }
        };
        load_blocks(&maps.x, &maps.w, p.k_blocks);
        // comes while the ring is still full
        next = draw();
        if constexpr (kRankSteps > 0) {
          if (p.overlap_previous && first) {
            ptx::wait_for_previous_launch();
            ptx::fence_proxy_async();
          }
          load_blocks(&maps.xa, &maps.b, p.rank_blocks);
        }
        first = false;
      }
      // behind the walk, which has reached the number of tiles
      if (is_last_number(next, walk.last, gridDim.x)) ptx::store_relaxed(p.tickets, 0);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    for (int index = tickets.take(lane); walk.seek(index, load_end, tile); index = tickets.take(lane)) {
      const int row = tile.row + part.row, column = tile.column * BLOCK_N + part.column;
      float d[kColumns / 2];
      // the last K-block of the ranks is apart: linear_sm90.cuh
      const int blocks = p.k_blocks + (kRankSteps > 0 ? p.rank_blocks - 1 : 0);
      for (int block = 0; block < blocks; ++block) {
        multiply_block<T, kColumns, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, block > 0);
      }
      if constexpr (kRankSteps > 0) {
        multiply_block<T, kColumns, kMajorB, kRankSteps>(d, pipeline, part, lane, true, true);
      }
      finish_blocks(pipeline, lane);

      if (p.bias != nullptr) {
        const T* bias = static_cast<const T*>(p.bias) + static_cast<int64_t>(tile.group) * p.N;
        add_bias<T, kColumns>(d, bias, column, p.N, thread);
      }
      // TMA clips at the end of y, and knows of no other end
      if (row + kWarpgroupRows <= tile.row_end || tile.row_end == p.rows) {
        store_tile<T, kColumns>(d, &maps.y, pipeline.output(consumer), row, column, consumer, thread);
      } else {
        store_rows<T, kColumns>(d, static_cast<T*>(p.y), p.stride_y, row, tile.row_end, column, p.N, thread);
      }
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
}

}  // namespace lorafuse::sm90

// y = x wᵀ + bias + xa bᵀ and xa = x aᵀ in one launch, for few columns of tiles (sm_90a). Shapes as in linear_sm90.cuh.
//
// A tile of column 0 passes over the rows of x from which xa is computed: it multiplies them by kRanks columns of a too,
// into a second accumulator, and publishes xa by the flag of its row block. It and the others of that row block read xa
// for their last K-block, by then from L2. Nothing passes over x again; a sixteenth more of the product is issued, in
// one of ceil(N / BLOCK_N) columns of tiles (at R 16; a model says 6 to 16 % of such a tile, not measured).
//
// Tiles are handed out by ticket, those of column 0 first (ColumnZeroFirst): a tile that waits has a later ticket than
// the one it waits for, which waits for no other tile. So no launch depends on how many of its blocks run at a time. The
// last reader of a flag sets it to zero again.
//
// FLOPs 2 M N (K + R) + 2 M K R. Bytes: x, w, y, xa once from memory where L2 holds what tiles share.
#pragma once

#include "xa_items_sm90.cuh"

namespace lorafuse::sm90 {

// Behind the shared memory of SharedPlan, on a 1024-byte boundary: a box of a for each stage, then the tickets.
template <int BLOCK_N, int kRanks>
struct XaTilesPlan {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  static constexpr int kABytes = kRanks * kBoxRowBytes;

  LF_HOST_DEVICE static constexpr int a(int stages) { return round_up(Plan::bytes(stages) - 1024, 1024); }
  LF_HOST_DEVICE static constexpr int tickets(int stages) { return a(stages) + stages * kABytes; }
  LF_HOST_DEVICE static constexpr int bytes(int stages) { return 1024 + tickets(stages) + Tickets::kBytes; }
};

template <class T, int BLOCK_N, int kRankSteps>
LF_KERNEL(kThreads)
xa_tiles_kernel(LF_GRID_CONSTANT LinearMaps maps, LF_GRID_CONSTANT LinearArguments p) {
  constexpr int kRanks = kRankSteps * kStepElements;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  using More = XaTilesPlan<BLOCK_N, kRanks>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, 1);
  Tickets tickets(pipeline.base + More::tickets(p.stages));
  const auto stage_of_a = [&] { return pipeline.base + More::a(p.stages) + pipeline.stage * More::kABytes; };
  const int warp = start_block(maps.x, maps.w, [&] {
    pipeline.initialize();
    tickets.initialize();
  });

  const ColumnZeroFirst order{p.order};
  const int tiles = p.order.tiles();
  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      const auto draw = [&] { return static_cast<int>(ptx::fetch_add_relaxed(p.workspace, 1)); };
      int next = draw();
      for (int index = tickets.pass(next); index < tiles; index = tickets.pass(next)) {
        const Tile tile = order.at(index);
        const int row = tile.row * BLOCK_M, column = tile.column * BLOCK_N;
        for (int block = 0; block < p.k_blocks; ++block) {
          pipeline.acquire(Plan::kStageBytes + (tile.column == 0 ? More::kABytes : 0));
          ptx::tma_load(pipeline.a(), &maps.x, block * BLOCK_K, row, pipeline.full());
          ptx::tma_load(pipeline.b(), &maps.w, block * BLOCK_K, column, pipeline.full());
          if (tile.column == 0) ptx::tma_load(stage_of_a(), &maps.a, block * BLOCK_K, 0, pipeline.full());
          pipeline.advance();
        }
        next = draw();
        wait_for_xa(p, tile.row);
        pipeline.acquire(Plan::kStageBytes);
        ptx::tma_load(pipeline.a(), &maps.xa, 0, row, pipeline.full());
        ptx::tma_load(pipeline.b(), &maps.b, 0, column, pipeline.full());
        pipeline.advance();
      }
      if (is_last_number(next, tiles, gridDim.x)) ptx::store_relaxed(p.workspace, 0);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    for (int index = tickets.take(lane); index < tiles; index = tickets.take(lane)) {
      const Tile tile = order.at(index);
      const int row = tile.row * BLOCK_M + part.row, column = tile.column * BLOCK_N;
      float d[BLOCK_N / 2];
      if (tile.column == 0) {
        float xa[kRanks / 2];
        for (int block = 0; block < p.k_blocks; ++block) {
          begin_stage(pipeline);
          const uint8_t* x = pipeline.a() + part.row * kBoxRowBytes;
          multiply<T, BLOCK_N, Major::K, kStepsOfBlock>(d, x, pipeline.b(), block > 0);
          multiply<T, kRanks, Major::K, kStepsOfBlock>(xa, x, stage_of_a(), block > 0);
          end_stage(pipeline, lane, block > 0);
        }
        finish_blocks(pipeline, lane);
        publish_xa<T, kRanks>(xa, p, tile.row, consumer, thread);
        multiply_block<T, BLOCK_N, Major::K, kRankSteps>(d, pipeline, part, lane, false, true);
      } else {
        for (int block = 0; block < p.k_blocks; ++block) {
          multiply_block<T, BLOCK_N, Major::K, kStepsOfBlock>(d, pipeline, part, lane, block > 0, block > 0);
        }
        multiply_block<T, BLOCK_N, Major::K, kRankSteps>(d, pipeline, part, lane, true, true);
      }
      finish_blocks(pipeline, lane);

      if (p.bias != nullptr) add_bias<T, BLOCK_N>(d, static_cast<const T*>(p.bias), column, p.N, thread);
      store_tile<T, BLOCK_N>(d, &maps.y, pipeline.output(consumer), row, column, consumer, thread);
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
}

}  // namespace lorafuse::sm90

// y = x wᵀ + bias + xa bᵀ and dx = dy w + mask ⊙ (dyb a), one persistent kernel for both directions (sm_90a).
//
// In the forward's names: x [M, K], w [N, K] (as stored; [K, N] in the backward, where K is the layer's N), xa [M, R],
// b [N, R] ([R, N] in the backward), y [M, N]; 16-bit elements, fp32 accumulators.
// Fused: the low-rank product is more reduction, [x | xa] [w | b]ᵀ, in the same ring of stages and the same
// accumulators: after the K-blocks of x and w come those of xa and b, zero-filled by TMA to 64 ranks, of which the last
// issues ceil(R / 16) steps. Bias in the epilogue. Nothing is saved but xa.
// FLOPs 2 M N (K + R). Bytes: x, w, y and xa once from memory where L2 holds what tiles share.
//
// Form::kForward        xa is there, or was written by the launch before, which this one may overlap.
// Form::kFusedXa   xa = x aᵀ is computed by this launch: some programs have one tile fewer than others and compute
//                       rows of xa first, in that slack (schedule.cuh), publish them by a flag for each row block, and
//                       the tiles wait for it before their last K-blocks, when it has long been set.
// Form::kDx             w and b are read with their columns contiguous (MN-major).
// Form::kDxAdapterGrads       the same, and blocks without a tile sum da and db meanwhile (adapter_grads_sm90.cuh).
// Form::kDxDropout      the low-rank product comes first and is masked in its accumulators, to which dy w is added.
//
// Roles: pipeline_sm90.cuh. The way out: epilogue_sm90.cuh. Host: linear_launch_sm90.cuh.
#pragma once

#include <lorafuse/schedule.cuh>

#include "adapter_grads_sm90.cuh"
#include "epilogue_sm90.cuh"

namespace lorafuse::sm90 {

enum class Form { kForward, kFusedXa, kDx, kDxAdapterGrads, kDxDropout };

constexpr int BLOCK_M = 128;

template <Form kForm>
constexpr Major kMajorOfB = kForm == Form::kForward || kForm == Form::kFusedXa ? Major::K : Major::MN;

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
  // kFusedXa
  void* xa;
  int64_t stride_xa;
  int row_items;      // clusters of row blocks whose xa is to be computed
  int item_programs;  // by the programs of the first tickets
  uint32_t* workspace;
  // kDxAdapterGrads: db and da, by the first blocks
  int sum_blocks;
  Sum sums[2];
  // kDxDropout
  const int64_t* seed;
  uint32_t drop_below;
};

// What a stage of the ring holds of an item of xa: kBlocks K-blocks of x, then as many of a. One fills 18 to 24 of the
// 48 KB of a stage of 128x256 tiles, and what the ring keeps in flight is what bounds an item's rate: by simulation of
// a measured launch 25 GB/s an SM with 54 KB, so that a stage holds two where they fit (docs/hopper.md, step 8).
template <int BLOCK_N, int kRankSteps>
struct XaItem {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  // of xa, that wgmma computes
  static constexpr int kColumns = kRankSteps == 1 ? 16 : kRankSteps == 2 ? 32 : 64;
  static constexpr int kABytes = kColumns * kBoxRowBytes;
  static constexpr int kBlocks = 2 * (Plan::kTileABytes + kABytes) <= Plan::kStageBytes ? 2 : 1;
  static constexpr int kBytes = kBlocks * (Plan::kTileABytes + kABytes);

  LF_DEVICE static uint8_t* x(const Pipeline<BLOCK_M, BLOCK_N>& pipeline, int i) {
    return pipeline.a() + i * Plan::kTileABytes;
  }
  LF_DEVICE static uint8_t* a(const Pipeline<BLOCK_M, BLOCK_N>& pipeline, int i) {
    return pipeline.a() + kBlocks * Plan::kTileABytes + i * kABytes;
  }
};

// Words of the workspace, zero before and after a launch: tickets of programs and of items, then for each row block the
// warpgroups that have published its xa and the tiles that have seen it.
constexpr int kProgramTickets = 0, kItemTickets = 1, kFlags = 2, kWordsOfFlag = 2;
// Warpgroups that write the xa of one row block.
constexpr uint32_t kPublishers = 2;

// One thread of the cluster draws a ticket; every thread of the cluster gets it. `last`: the ticket that nobody
// follows, after which the counter is zero again. `turn` alternates the word, so that a slow warp still reads the one
// before.
LF_DEVICE int draw_ticket(uint32_t* counter, uint32_t last, uint32_t* mailbox, int& turn, int cluster, int rank) {
  if (threadIdx.x == 0 && rank == 0) {
    const uint32_t ticket = ptx::fetch_add_relaxed(counter, 1);
    if (ticket == last) ptx::store_relaxed(counter, 0);
    for (int block = 0; block < cluster; ++block) ptx::store_cluster(mailbox + turn, block, ticket);
  }
  ptx::warp_sync();
  ptx::cluster_sync();
  const int ticket = static_cast<int>(ptx::load_shared<uint32_t>(mailbox + turn));
  turn ^= 1;
  return ticket;
}

// Producer: waits until both warpgroups have published xa's row block. The last of the tiles that need it clears it.
LF_DEVICE void wait_for_xa(const LinearArguments& p, int row_block) {
  uint32_t* flag = p.workspace + kFlags + kWordsOfFlag * row_block;
  uint32_t* users = flag + 1;
  ptx::wait_at_least(flag, kPublishers);
  ptx::fence_proxy_async();
  const uint32_t before = ptx::fetch_add_acquire_release(users, 1);
  if (before + 1 == static_cast<uint32_t>(p.order.columns)) {
    ptx::store_relaxed(flag, 0);
    ptx::store_relaxed(users, 0);
  }
}

// Consumer: rounds xa [64, kColumns] to T, stores it and publishes it. Columns from R to the next multiple of 8, which
// a row of xa has, are zero.
template <class T, int kColumns>
LF_DEVICE void publish_xa(const float (&d)[kColumns / 2], const LinearArguments& p, int row_block, int consumer,
                          int thread) {
  const int row = row_block * BLOCK_M + consumer * kWarpgroupRows;
  store_rows<T, kColumns>(d, static_cast<T*>(p.xa), p.stride_xa, row, p.M, 0, round_up(p.R, 8), thread);
  consumer_sync(consumer);
  uint32_t* flag = p.workspace + kFlags + kWordsOfFlag * row_block;
  if (thread == 0) ptx::add_release(flag, 1);
}

// Producer, one thread: an item of xa.
template <class Item, int BLOCK_N>
LF_DEVICE void load_xa_item(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const LinearMaps& maps, int k_blocks, int row_block) {
  for (int block = 0; block < k_blocks; block += Item::kBlocks) {
    pipeline.acquire(Item::kBytes);
    for (int i = 0; i < Item::kBlocks; ++i) {
      // zeros behind the last column
      const int k = (block + i) * BLOCK_K;
      ptx::tma_load(Item::x(pipeline, i), &maps.x, k, row_block * BLOCK_M, pipeline.full());
      ptx::tma_load(Item::a(pipeline, i), &maps.a, k, 0, pipeline.full());
    }
    pipeline.advance();
  }
}

// Consumer: its rows of an item, `row` the first of them in a tile, computed and published.
template <class T, class Item, int BLOCK_N>
LF_DEVICE void xa_item(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const LinearArguments& p, int row_block, int row,
                       int consumer, int thread) {
  const int lane = thread % 32;
  float d[Item::kColumns / 2];
  for (int block = 0; block < p.k_blocks; block += Item::kBlocks) {
    begin_stage(pipeline);
    LF_UNROLL
    for (int i = 0; i < Item::kBlocks; ++i) {
      multiply<T, Item::kColumns, Major::K, kStepsOfBlock>(d, Item::x(pipeline, i) + row * kBoxRowBytes,
                                                           Item::a(pipeline, i), block + i > 0);
    }
    end_stage(pipeline, lane, block > 0);
  }
  finish_blocks(pipeline, lane);
  publish_xa<T, Item::kColumns>(d, p, row_block, consumer, thread);
}

template <class T, int BLOCK_N, int kRankSteps, Form kForm>
LF_KERNEL(kThreads)
linear_kernel(LF_GRID_CONSTANT LinearMaps maps, LF_GRID_CONSTANT LinearArguments p) {
  constexpr Major kMajorB = kMajorOfB<kForm>;
  constexpr bool kFused = kForm == Form::kFusedXa;
  constexpr bool kBeside = kForm == Form::kDxAdapterGrads;
  constexpr bool kDropout = kForm == Form::kDxDropout;
  using Item = XaItem<BLOCK_N, kRankSteps>;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, p.cluster);
  const int rank = p.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  // the same in all lanes, which the shuffle tells the compiler
  const int warp = ptx::shuffle(static_cast<int>(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    pipeline.initialize();
    ptx::tma_prefetch(&maps.x);
    ptx::tma_prefetch(&maps.w);
  }
  ptx::warp_sync();
  // the barriers of both blocks are there
  ptx::cluster_sync();

  // Blocks that sum have the lowest numbers and so start first: their work is as long as that of all tiles of a block.
  const int sum_blocks = kBeside ? p.sum_blocks : 0;
  const Walk walk{p.order.tiles(), static_cast<int>(gridDim.x) / p.cluster - sum_blocks};
  int program = static_cast<int>(blockIdx.x) / p.cluster - sum_blocks;
  int turn = 0;
  if constexpr (kFused) {
    // Numbered as they arrive: whoever waits for an item knows that those who compute items are running.
    program = draw_ticket(p.workspace + kProgramTickets, walk.programs - 1, pipeline.mailbox(), turn, p.cluster, rank);
  }
  const bool sums = kBeside && program < 0;
  const int waves = sums ? 0 : walk.count(program);
  const auto next_item = [&] {
    // each of the item programs draws one ticket that is no item
    return draw_ticket(p.workspace + kItemTickets, p.row_items + p.item_programs - 1, pipeline.mailbox(), turn,
                       p.cluster, rank);
  };
  const auto first_row_block = [&](int row) { return row * p.cluster + rank; };

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if constexpr (kFused) {
      if (program < p.item_programs) {
        for (int item = next_item(); item < p.row_items; item = next_item()) {
          if (warp == 0 && ptx::elect_one()) load_xa_item<Item>(pipeline, maps, p.k_blocks, first_row_block(item));
          ptx::warp_sync();
        }
      }
    }
    if (warp == 0 && ptx::elect_one()) {
      if constexpr (kBeside) {
        if (sums) {
          if (p.overlap_previous) {
            ptx::wait_for_previous_launch();
            ptx::fence_proxy_async();
          }
          for_each_item<BLOCK_N>(p.sums, program + sum_blocks, sum_blocks,
                                 [&](int sum, int column) { load_item(pipeline, maps.sums[sum], 0, p.M, column); });
        }
      }
      for (int wave = 0; wave < waves; ++wave) {
        const Tile tile = p.order.at(walk.tile(program, wave));
        const int row_block = first_row_block(tile.row), column = tile.column * BLOCK_N;
        const auto load_blocks = [&](const TensorMap* map_a, const TensorMap* map_b, int blocks) {
          for (int block = 0; block < blocks; ++block) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), map_a, block * BLOCK_K, row_block * BLOCK_M, pipeline.full());
            load_b<kMajorB>(pipeline, map_b, block * BLOCK_K, column, rank);
            pipeline.advance();
          }
        };
        if constexpr (!kDropout) load_blocks(&maps.x, &maps.w, p.k_blocks);
        if constexpr (kRankSteps > 0) {
          if constexpr (kFused) wait_for_xa(p, row_block);
          if (p.overlap_previous && wave == 0) {
            ptx::wait_for_previous_launch();
            ptx::fence_proxy_async();
          }
          load_blocks(&maps.xa, &maps.b, p.rank_blocks);
        }
        if constexpr (kDropout) load_blocks(&maps.x, &maps.w, p.k_blocks);
      }
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    if constexpr (kFused) {
      if (program < p.item_programs) {
        for (int item = next_item(); item < p.row_items; item = next_item()) {
          xa_item<T, Item>(pipeline, p, first_row_block(item), part.row, consumer, thread);
        }
      }
    }
    if constexpr (kBeside) {
      if (sums) {
        for_each_item<BLOCK_N>(p.sums, program + sum_blocks, sum_blocks, [&](int sum, int column) {
          const auto store = [&](int64_t place, float value) { store_sum<T>(p.sums[sum], place, value); };
          float d[BLOCK_N / 2];
          sum_item<T>(d, pipeline, p.sums[sum], 0, p.M, p.R, column, consumer, thread, store);
        });
      }
    }
    for (int wave = 0; wave < waves; ++wave) {
      const Tile tile = p.order.at(walk.tile(program, wave));
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
  // the other block of a cluster may still arrive at this one's barriers
  ptx::warp_sync();
  ptx::cluster_sync();
}

}  // namespace lorafuse::sm90

// xa of a row block, computed in the launch that reads it: how it is computed, published and waited for (sm_90a).
//
// An item is 128 rows of x and all of a, in accumulators of a consumer's own. Whoever reads xa waits for the flag of its
// row block; the launches order their work so that what is waited for has an earlier number (schedule.cuh).
#pragma once

#include "linear_sm90.cuh"

namespace lorafuse::sm90 {

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

// Words of the workspace, zero before and after a launch: numbers that were drawn, of which one_launch_kernel has two
// kinds, then for each row block the warpgroups that have published its xa and the tiles that have seen it.
constexpr int kFlags = 2, kWordsOfFlag = 2;
// Warpgroups that write the xa of one row block.
constexpr uint32_t kPublishers = 2;

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

}  // namespace lorafuse::sm90

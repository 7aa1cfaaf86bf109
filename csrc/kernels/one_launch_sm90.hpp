// Host: what both directions of one_launch_kernel set and check alike.
#pragma once

#include "linear_launch_sm90.cuh"
#include "one_launch_sm90.cuh"
#include "round_checks.hpp"

namespace lorafuse::sm90 {

// The product of [M, reduction] and [columns, reduction], its rows of xa or dyb, and the adapters that are rounded: the
// one that rows are multiplied by first.
template <int BLOCK_N>
void set_work(OneLaunchArguments& arguments, const Tiling& tiling, int64_t M, int64_t columns, int64_t reduction,
              int64_t R, uint32_t* workspace, const Round& rounded_first, const Round& rounded_second) {
  arguments.M = static_cast<int>(M);
  arguments.N = static_cast<int>(columns);
  arguments.R = static_cast<int>(R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(reduction, BLOCK_K));
  arguments.rank_blocks = 1;
  arguments.order = {static_cast<int>(ceil_div<int64_t>(M, BLOCK_M)),
                     static_cast<int>(ceil_div<int64_t>(columns, BLOCK_N)), tiling.group_m};
  arguments.work = {arguments.order, arguments.order.rows, 0};
  arguments.stages = tiling.stages;
  arguments.cluster = 1;
  arguments.workspace = workspace;
  arguments.rounded[0] = rounded_first;
  arguments.rounded[1] = rounded_second;
  for (int i = 0; i < 2; ++i) {
    arguments.slices[i] = static_cast<int>(ceil_div<int64_t>(skinny::round_chunks(arguments.rounded[i]), 32));
  }
}

template <class T, int BLOCK_N, int kRankSteps, Major kMajorB>
void launch_one(const LinearMaps& maps, OneLaunchArguments& arguments, const Tiling& tiling, Stream stream) {
  const int shared_bytes = TicketPlan<BLOCK_M, BLOCK_N>::bytes(tiling.stages);
  check_tiling(tiling, SharedPlan<BLOCK_M, BLOCK_N>::kStageBytes, shared_bytes);
  const BackwardOrder& work = arguments.work;
  const int64_t count = int64_t{work.tiles.rows} * (work.tiles.columns + 1) + int64_t{work.chunks()} * work.items;
  require(count < int64_t{1} << 30, count, " tiles and items are more than 2^30");
  arguments.words = one_launch_words(work);
  LaunchConfig config{clusters_launched(tiling, count), kThreads};
  config.shared_bytes = shared_bytes;
  config.overlap_previous = true;
  launch(one_launch_kernel<T, BLOCK_N, kRankSteps, kMajorB>, config, stream, maps, arguments);
}

// Calls run(T{}, tile's columns, rank steps) for FusedForward or FusedBackward.
template <class P, class Run>
void choose_one_launch(const P& p, const char* direction, Run&& run) {
  // ranks whose sums are in the accumulators of one item
  constexpr int64_t kMaxRank = 64;
  require(p.R >= 1 && p.R <= kMaxRank, "R of ", p.R, ": one launch computes a ", direction, " of 1 to ", kMaxRank,
          " ranks");
  skinny::check_round(p.rounded_a, p.type);
  skinny::check_round(p.rounded_b, p.type);
  require(p.workspace != nullptr, "workspace is null");
  require(p.tiling.cluster == 1, "clusters of ", p.tiling.cluster, " blocks in one launch for ", direction,
          "; they have 1");
  require(p.tiling.block_m == BLOCK_M, "block_m of ", p.tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");
  choose_type(p.type, [&]<class T>(T) {
    choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
      // 1 or 4, of which the last multiply zeros: compiling a kernel takes long, and this is no part of a main loop
      choose<1, 4>(last_rank_steps(p.R) == 1 ? 1 : 4, "rank steps", [&](auto steps) { run(T{}, block_n, steps); });
    });
  });
}

}  // namespace lorafuse::sm90

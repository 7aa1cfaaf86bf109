// Host: from sizes and pointers to a launch of grouped_kernel. Instantiated in grouped_*_sm90.cu.
#pragma once

#include "grouped_sm90.cuh"
#include "linear_launch_sm90.cuh"

namespace lorafuse::sm90 {

// An operand B for each group: [groups, columns, reduction] (K-major) or [groups, reduction, columns] (MN-major).
template <class T, Major kMajor, int BLOCK_N>
TensorMap group_b_map(const void* base, int64_t groups, int64_t columns, int64_t reduction) {
  const int64_t group_bytes = columns * reduction * 2;
  if (kMajor == Major::K) {
    return tensor_map<T, 3>(base, {reduction, columns, groups}, {reduction * 2, group_bytes},
                            {kBoxElements, BLOCK_N, 1});
  }
  return tensor_map<T, 3>(base, {columns, reduction, groups}, {columns * 2, group_bytes}, {kBoxElements, BLOCK_K, 1});
}

template <class T, int BLOCK_M, int BLOCK_N, int kRankSteps, bool kTransposed>
void launch_grouped_kernel(const GroupedLinear& p, Stream stream) {
  constexpr Major kMajor = kTransposed ? Major::MN : Major::K;
  using Plan = TicketPlan<BLOCK_M, BLOCK_N>;
  check_tiling(p.tiling, Plan::Plan::kStageBytes, Plan::bytes(p.tiling.stages));

  GroupedMaps maps{};
  maps.x = matrix_map<T>(p.x, p.rows, p.K, p.stride_x, BLOCK_M);
  maps.w = group_b_map<T, kMajor, BLOCK_N>(p.w, p.groups, p.N, p.K);
  maps.y = matrix_map<T>(p.y, p.rows, p.N, p.stride_y, kWarpgroupRows);
  if (kRankSteps > 0) {
    maps.xa = matrix_map<T>(p.xa, p.rows, p.R, p.stride_xa, BLOCK_M);
    maps.b = group_b_map<T, kMajor, BLOCK_N>(p.b, p.groups, p.N, p.R);
  }

  GroupedArguments arguments{};
  arguments.rows = static_cast<int>(p.rows);
  arguments.groups = static_cast<int>(p.groups);
  arguments.N = static_cast<int>(p.N);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  arguments.rank_blocks = static_cast<int>(ceil_div<int64_t>(p.R, BLOCK_K));
  arguments.stages = p.tiling.stages;
  arguments.offsets = p.offsets;
  arguments.bias = p.bias;
  arguments.y = p.y;
  arguments.stride_y = p.stride_y;
  arguments.overlap_previous = p.overlap_previous;
  arguments.tickets = p.workspace;

  // no more tiles than these: each group may end in a tile of its own
  const int64_t tiles = (p.rows / BLOCK_M + std::min(p.rows, p.groups)) * ceil_div<int64_t>(p.N, BLOCK_N);
  LaunchConfig config{clusters_launched(p.tiling, tiles), kThreads};
  require(tiles + config.grid < int64_t{1} << 31, tiles, " tiles are more than there are tickets");
  config.shared_bytes = Plan::bytes(p.tiling.stages);
  // without ranks nothing in the kernel waits
  config.overlap_previous = p.overlap_previous && kRankSteps > 0;
  launch(grouped_kernel<T, BLOCK_M, BLOCK_N, kRankSteps, kTransposed>, config, stream, maps, arguments);
}

template <bool kTransposed>
void launch_grouped(const GroupedLinear& p, Stream stream) {
  choose_type(p.type, [&]<class T>(T) {
    // 48 ranks take four steps, of which the last multiplies zeros
    const int steps = last_rank_steps(p.R) == 3 ? 4 : last_rank_steps(p.R);
    choose<0, 1, 2, 4>(steps, "rank steps", [&](auto steps) {
      if (p.tiling.block_m == 64) {
        // no half of 128 columns: such small tiles would wait for L2
        choose<256>(p.tiling.block_n, "block_m of 64 with block_n", [&](auto block_n) {
          launch_grouped_kernel<T, 64, block_n, steps, kTransposed>(p, stream);
        });
      } else {
        choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
          launch_grouped_kernel<T, 128, block_n, steps, kTransposed>(p, stream);
        });
      }
    });
  });
}

extern template void launch_grouped<false>(const GroupedLinear&, Stream);
extern template void launch_grouped<true>(const GroupedLinear&, Stream);

}  // namespace lorafuse::sm90

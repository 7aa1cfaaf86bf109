// Host: from sizes and pointers to a launch of gathered_kernel. Instantiated in gathered_*_sm90.cu.
#pragma once

#include <lorafuse/api_gathered.hpp>

#include "gathered_sm90.cuh"
#include "grouped_launch_sm90.cuh"

namespace lorafuse::sm90 {

template <class T, int BLOCK_M, int BLOCK_N, bool kTransposed, bool kGathered, Gates kGates = Gates::kNone>
void launch_gathered_kernel(const GatheredLinear& p, Stream stream) {
  constexpr Major kMajor = kTransposed ? Major::MN : Major::K;
  using Plan = TicketPlan<BLOCK_M, BLOCK_N>;
  check_tiling(p.tiling, Plan::Plan::kStageBytes, Plan::bytes(p.tiling.stages));

  // gate and up, where w has both
  constexpr int kParts = kGates == Gates::kForward ? 2 : 1, kWidth = BLOCK_N / kParts;
  GatheredMaps maps{};
  maps.w = group_b_map<T, kMajor, kWidth>(p.w, p.groups, p.N * kParts, p.K);
  maps.y = matrix_map<T>(p.y, p.rows, p.N, p.stride_y, kWarpgroupRows);
  if (!kGathered) maps.x = matrix_map<T>(p.x, p.rows, p.K, p.stride_x, BLOCK_M);
  if (p.R > 0) {
    if (!kGathered) maps.xa = matrix_map<T>(p.xa, p.rows, p.R, p.stride_xa, BLOCK_M);
    maps.b = group_b_map<T, kMajor, kWidth>(p.b, p.groups, p.N * kParts, p.R);
  }
  if (kGates != Gates::kNone) {
    maps.up = matrix_map<T>(static_cast<T*>(p.y) + p.N, p.rows, p.N, p.stride_y, kWarpgroupRows);
    maps.h = matrix_map<T>(p.h, p.rows, p.N, p.stride_h, kWarpgroupRows);
  }
  if (kGates == Gates::kBackward) {
    const T* const u = static_cast<const T*>(p.u);
    maps.read[0] = matrix_map<T>(u, p.rows, p.N, p.stride_u, BLOCK_M);
    maps.read[1] = matrix_map<T>(u + p.N, p.rows, p.N, p.stride_u, BLOCK_M);
  }

  GatheredArguments arguments{};
  arguments.rows = static_cast<int>(p.rows);
  arguments.groups = static_cast<int>(p.groups);
  arguments.N = static_cast<int>(p.N);
  arguments.K = static_cast<int>(p.K);
  arguments.R = static_cast<int>(p.R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  arguments.rank_blocks = static_cast<int>(ceil_div<int64_t>(p.R, BLOCK_K));
  arguments.ends_short = last_rank_steps(p.R) == 1;
  arguments.whole_blocks = arguments.k_blocks + arguments.rank_blocks - (arguments.ends_short ? 1 : 0);
  arguments.stages = p.tiling.stages;
  arguments.offsets = p.offsets;
  arguments.order = p.order;
  arguments.choices = static_cast<int>(p.choices);
  arguments.x = p.x;
  arguments.stride_x = p.stride_x;
  arguments.xa = p.xa;
  arguments.stride_xa = p.stride_xa;
  arguments.bias = p.bias;
  arguments.y = p.y;
  arguments.stride_y = p.stride_y;
  arguments.tickets = p.workspace;
  arguments.activation = p.activation;
  arguments.h = p.h;
  arguments.stride_h = p.stride_h;
  arguments.row_scale = p.row_scale;
  arguments.products = p.products;

  // no more tiles than these: each group may end in a tile of its own
  const int64_t tiles = (p.rows / BLOCK_M + std::min(p.rows, p.groups)) * ceil_div<int64_t>(p.N, kWidth);
  LaunchConfig config{clusters_launched(p.tiling, tiles), kThreads};
  require(tiles + config.grid < int64_t{1} << 31, tiles, " tiles are more than there are tickets");
  config.shared_bytes = Plan::bytes(p.tiling.stages);
  launch(gathered_kernel<T, BLOCK_M, BLOCK_N, kTransposed, kGathered, kGates>, config, stream, maps, arguments);
}

template <bool kTransposed>
void launch_gathered(const GatheredLinear& p, Stream stream) {
  choose_type(p.type, [&]<class T>(T) {
    choose<0, 1>(p.order != nullptr, "order", [&](auto gathered) {
      if (p.tiling.block_m == 64) {
        choose<256>(p.tiling.block_n, "block_m of 64 with block_n", [&](auto block_n) {
          launch_gathered_kernel<T, 64, block_n, kTransposed, gathered == 1>(p, stream);
        });
      } else {
        choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
          launch_gathered_kernel<T, 128, block_n, kTransposed, gathered == 1>(p, stream);
        });
      }
    });
  });
}

// Gate, up and h in tiles of 128 x 256, rows through the order.
void launch_gathered_gated(const GatheredLinear& p, Stream stream);
// The gradients of gate and up, in the same tiles of dh.
void launch_gathered_gradients(const GatheredLinear& p, Stream stream);

extern template void launch_gathered<false>(const GatheredLinear&, Stream);
extern template void launch_gathered<true>(const GatheredLinear&, Stream);

}  // namespace lorafuse::sm90

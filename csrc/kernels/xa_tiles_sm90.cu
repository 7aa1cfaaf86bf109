// Host: from sizes and pointers to a launch of xa_tiles_kernel.
#include "linear_launch_sm90.cuh"
#include "xa_tiles_sm90.cuh"

namespace lorafuse::sm90 {
namespace {

template <class T, int BLOCK_N, int kRankSteps>
void launch_kernel(const Linear& p, Stream stream) {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  using More = XaTilesPlan<BLOCK_N, kRankSteps * kStepElements>;
  check_tiling(p.tiling, Plan::kStageBytes + More::kABytes, More::bytes(p.tiling.stages));
  require(p.tiling.cluster == 1, "clusters of ", p.tiling.cluster,
          " blocks in a launch whose tiles compute xa; they have 1");
  require(p.tiling.block_m == BLOCK_M, "block_m of ", p.tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");

  LinearMaps maps{};
  maps.x = matrix_map<T>(p.x, p.M, p.K, p.stride_x, BLOCK_M);
  maps.w = matrix_map<T>(p.w, p.N, p.K, p.stride_w, BLOCK_N);
  maps.xa = matrix_map<T>(p.xa, p.M, p.R, p.stride_xa, BLOCK_M);
  maps.b = matrix_map<T>(p.b, p.N, p.R, p.stride_b, BLOCK_N);
  maps.a = matrix_map<T>(p.a, p.R, p.K, p.stride_a, kRankSteps * kStepElements);
  maps.y = matrix_map<T>(p.y, p.M, p.N, p.stride_y, kWarpgroupRows);

  LinearArguments arguments{};
  arguments.M = static_cast<int>(p.M);
  arguments.N = static_cast<int>(p.N);
  arguments.R = static_cast<int>(p.R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  arguments.order = {static_cast<int>(ceil_div<int64_t>(p.M, BLOCK_M)),
                     static_cast<int>(ceil_div<int64_t>(p.N, BLOCK_N)), p.tiling.group_m};
  arguments.stages = p.tiling.stages;
  arguments.cluster = 1;
  arguments.bias = p.bias;
  arguments.workspace = p.workspace;
  arguments.xa = const_cast<void*>(p.xa);
  arguments.stride_xa = p.stride_xa;
  const int64_t tiles = int64_t{arguments.order.rows} * arguments.order.columns;
  require(tiles < int64_t{1} << 30, tiles, " tiles are more than 2^30");

  LaunchConfig config{clusters_launched(p.tiling, tiles), kThreads};
  config.shared_bytes = More::bytes(p.tiling.stages);
  launch(xa_tiles_kernel<T, BLOCK_N, kRankSteps>, config, stream, maps, arguments);
}

}  // namespace

void launch_xa_tiles(const Linear& p, Stream stream) {
  choose_type(p.type, [&]<class T>(T) {
    choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
      choose<1, 2>(last_rank_steps(p.R), "rank steps", [&](auto steps) { launch_kernel<T, block_n, steps>(p, stream); });
    });
  });
}

}  // namespace lorafuse::sm90

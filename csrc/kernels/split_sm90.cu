// split_linear of api_split.hpp: checks, and from sizes and pointers to a launch of split_kernel.
#include <lorafuse/api_split.hpp>

#include "checks.hpp"
#include "linear_launch_sm90.cuh"
#include "split_sm90.cuh"

namespace lorafuse {
namespace {

using namespace sm90;

constexpr int64_t kMaxRank = 32;

template <class T, int kRankSteps>
void launch_kernel(const SplitLinear& p, Stream stream) {
  using Plan = SharedPlan<BLOCK_M, kSplitColumns>;
  using Parts = SplitPlan<kRankSteps * kStepElements>;
  const int stages = p.tiling.stages, shared_bytes = Parts::bytes(stages);
  check_tiling(p.tiling, Plan::kStageBytes + Parts::kABytes, shared_bytes);
  require(Parts::fits(stages), stages, " stages are too few for the sums of a tile");
  require(p.tiling.block_n == kSplitColumns && p.tiling.block_m == BLOCK_M, "tiles of ", p.tiling.block_m, " x ",
          p.tiling.block_n, "; where blocks divide K they are ", BLOCK_M, " x ", kSplitColumns);

  LinearMaps maps{};
  maps.x = matrix_map<T>(p.x, p.M, p.K, p.stride_x, BLOCK_M);
  maps.w = matrix_map<T>(p.w, p.N, p.K, p.stride_w, kSplitColumns);

  SplitArguments arguments{};
  arguments.M = static_cast<int>(p.M);
  arguments.N = static_cast<int>(p.N);
  arguments.K = static_cast<int>(p.K);
  arguments.R = static_cast<int>(p.R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  require(arguments.k_blocks >= p.splits, "K of ", p.K, " has ", arguments.k_blocks, " blocks of ", BLOCK_K, " for ",
          p.splits, " parts");
  arguments.order = {static_cast<int>(ceil_div<int64_t>(p.M, BLOCK_M)),
                     static_cast<int>(ceil_div<int64_t>(p.N, kSplitColumns)), p.tiling.group_m};
  arguments.stages = stages;
  arguments.cluster = p.splits;
  arguments.bias = p.bias;
  arguments.a = p.a;
  arguments.stride_a = p.stride_a;
  arguments.b = p.b;
  arguments.stride_b = p.stride_b;
  arguments.a_fp32 = p.a_type == Type::FP32;
  arguments.b_fp32 = p.b_type == Type::FP32;
  arguments.scale = p.scale;
  arguments.xa = p.xa;
  arguments.stride_xa = p.stride_xa;
  arguments.y = p.y;
  arguments.stride_y = p.stride_y;
  const int64_t blocks = int64_t{arguments.order.rows} * arguments.order.columns * p.splits;
  require(blocks < int64_t{1} << 31, blocks, " blocks are more than 2^31 - 1");

  LaunchConfig config{static_cast<int>(blocks), kThreads};
  config.shared_bytes = shared_bytes;
  config.cluster = p.splits;
  config.overlap_previous = true;
  launch(split_kernel<T, kRankSteps>, config, stream, maps, arguments);
}

}  // namespace

void split_linear(const SplitLinear& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  if (p.M == 0 || p.N == 0) return;
  check_features("N", p.N);
  check_features("K", p.K);
  require(p.R >= 1 && p.R <= kMaxRank, "R of ", p.R, ": tiles compute xa of 1 to ", kMaxRank, " ranks");
  require(p.splits == 2 || p.splits == 4, "splits of ", p.splits, ": 2 or 4 blocks divide K");
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("w", p.w, p.K, p.stride_w);
  check_adapter_type(p.a_type, p.type);
  check_adapter_type(p.b_type, p.type);
  check_matrix("a", p.a, p.K, p.stride_a, p.a_type == Type::FP32 ? 4 : 2);
  require(p.b != nullptr, "b is null");
  check_stride("b", p.R, p.stride_b);
  check_matrix("xa", p.xa, p.R, p.stride_xa);
  check_matrix("y", p.y, p.N, p.stride_y);
  choose_type(p.type, [&]<class T>(T) {
    choose<1, 2>(last_rank_steps(p.R), "rank steps",
                 [&](auto steps) { launch_kernel<T, steps>(p, static_cast<Stream>(stream)); });
  });
}

}  // namespace lorafuse

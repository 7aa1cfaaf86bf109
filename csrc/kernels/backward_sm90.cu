// fused_backward of api_backward.hpp: checks, and from sizes and pointers to a launch of backward_kernel.
#include <lorafuse/api_backward.hpp>

#include "backward_sm90.cuh"
#include "checks.hpp"
#include "linear_launch_sm90.cuh"
#include "round_checks.hpp"

namespace lorafuse {
namespace {

using namespace sm90;

// Ranks whose dyb, da and db are computed in the accumulators of one item.
constexpr int64_t kMaxRank = 64;

int64_t chunks(const FusedBackward& p) { return ceil_div(p.M, p.sum_rows); }

template <class T, int BLOCK_N, int kRankSteps>
void launch_kernel(const FusedBackward& p, Stream stream) {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  const int shared_bytes = BackwardPlan<BLOCK_N>::bytes(p.tiling.stages);
  check_tiling(p.tiling, Plan::kStageBytes, shared_bytes);
  require(p.tiling.cluster == 1, "clusters of ", p.tiling.cluster, " blocks in one launch for backward; they have 1");
  require(p.tiling.block_m == BLOCK_M, "block_m of ", p.tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");

  LinearMaps maps{};
  maps.x = matrix_map<T>(p.dy, p.M, p.N, p.stride_dy, BLOCK_M);
  maps.w = operand_b_map<T, Major::MN, BLOCK_N>(p.w, p.K, p.N, p.stride_w, 1);
  maps.xa = matrix_map<T>(p.dyb, p.M, p.R, p.stride_dyb, BLOCK_M);
  maps.b = operand_b_map<T, Major::MN, BLOCK_N>(p.a, p.K, p.R, p.stride_a, 1);
  maps.a = matrix_map<T>(p.b, p.R, p.N, p.stride_b, XaItem<BLOCK_N, kRankSteps>::kColumns);
  maps.y = matrix_map<T>(p.dx, p.M, p.K, p.stride_dx, kWarpgroupRows);

  BackwardArguments arguments{};
  arguments.M = static_cast<int>(p.M);
  arguments.N = static_cast<int>(p.K);
  arguments.R = static_cast<int>(p.R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.N, BLOCK_K));
  arguments.rank_blocks = 1;
  arguments.stages = p.tiling.stages;
  arguments.cluster = 1;
  arguments.xa = p.dyb;
  arguments.stride_xa = p.stride_dyb;
  arguments.workspace = p.workspace;
  set_sum<T, BLOCK_N>(maps, arguments, 0, p.db, p.db_type, p.N, p.dy, p.stride_dy, p.xa, p.stride_xa, p.scale);
  set_sum<T, BLOCK_N>(maps, arguments, 1, p.da, p.da_type, p.K, p.x, p.stride_x, p.dyb, p.stride_dyb, 1.0f);

  arguments.order = {static_cast<int>(ceil_div<int64_t>(p.M, BLOCK_M)),
                     static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_N)), p.tiling.group_m};
  arguments.work = {arguments.order, static_cast<int>(std::min<int64_t>(p.sum_rows / BLOCK_M, arguments.order.rows)),
                    arguments.sums[0].column_blocks + arguments.sums[1].column_blocks};
  arguments.words = backward_words(arguments.work);
  arguments.rounded[0] = p.rounded_b;
  arguments.rounded[1] = p.rounded_a;
  for (int i = 0; i < 2; ++i) {
    arguments.slices[i] = static_cast<int>(ceil_div<int64_t>(skinny::round_chunks(arguments.rounded[i]), 32));
  }
  arguments.partials = static_cast<float*>(p.partials);
  const int64_t work = int64_t{arguments.order.rows} * (arguments.order.columns + 1) +
                       int64_t{arguments.work.chunks()} * arguments.work.items;
  require(work < int64_t{1} << 30, work, " tiles and items are more than 2^30");

  LaunchConfig config{clusters_launched(p.tiling, work), kThreads};
  config.shared_bytes = shared_bytes;
  launch(backward_kernel<T, BLOCK_N, kRankSteps>, config, stream, maps, arguments);
}

}  // namespace

int64_t fused_backward_workspace(int64_t M, int64_t N, int64_t K) {
  check_size("M", M);
  check_size("N", N);
  check_size("K", K);
  // of whatever tiles and chunks
  const auto blocks = [](int64_t size) { return ceil_div<int64_t>(size, BLOCK_M); };
  return kFlags + (kWordsOfFlag + 1) * blocks(M) + 2 + blocks(N) + blocks(K);
}

int64_t fused_backward_partials(const FusedBackward& p) {
  require(p.sum_rows >= BLOCK_M && p.sum_rows % BLOCK_M == 0, "sum_rows of ", p.sum_rows, " is not a multiple of ",
          BLOCK_M);
  return chunks(p) <= 1 ? 0 : 4 * chunks(p) * p.R * ((p.db ? p.N : 0) + (p.da ? p.K : 0));
}

void fused_backward(const FusedBackward& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  if (p.M == 0 || p.K == 0) return;
  require(p.N > 0, "N of 0 has nothing to multiply");
  require(p.K % 8 == 0 && p.N % 8 == 0, "N of ", p.N, " and K of ", p.K, " are not multiples of 8");
  require(p.R >= 1 && p.R <= kMaxRank, "R of ", p.R, ": one launch computes a backward of 1 to ", kMaxRank, " ranks");
  check_matrix("dy", p.dy, p.N, p.stride_dy);
  check_matrix("w", p.w, p.K, p.stride_w);
  check_matrix("a", p.a, p.K, p.stride_a);
  check_matrix("b", p.b, p.N, p.stride_b);
  check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
  check_matrix("dx", p.dx, p.K, p.stride_dx);
  for (const Type type : {p.da_type, p.db_type}) check_adapter_type(type, p.type);
  if (p.da != nullptr) check_matrix("x", p.x, p.K, p.stride_x);
  if (p.db != nullptr) check_matrix("xa", p.xa, p.R, p.stride_xa);
  skinny::check_round(p.rounded_a, p.type);
  skinny::check_round(p.rounded_b, p.type);
  if (fused_backward_partials(p) > 0) check_address("partials", p.partials, 16);
  require(p.workspace != nullptr, "workspace is null");
  choose_type(p.type, [&]<class T>(T) {
    choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
      // 1 or 4, of which the last multiply zeros: compiling a kernel takes long, and this is no part of a main loop
      choose<1, 4>(last_rank_steps(p.R) == 1 ? 1 : 4, "rank steps",
                   [&](auto steps) { launch_kernel<T, block_n, steps>(p, static_cast<Stream>(stream)); });
    });
  });
}

}  // namespace lorafuse

// fused_backward of api_backward.hpp: checks, and from sizes and pointers to a launch of one_launch_kernel.
#include <lorafuse/api_backward.hpp>

#include "checks.hpp"
#include "one_launch_sm90.hpp"

namespace lorafuse {
namespace {

using namespace sm90;

int64_t chunks(const FusedBackward& p) { return ceil_div(p.M, p.sum_rows); }

template <class T, int BLOCK_N, int kRankSteps>
void launch_kernel(const FusedBackward& p, Stream stream) {
  LinearMaps maps{};
  maps.x = matrix_map<T>(p.dy, p.M, p.N, p.stride_dy, BLOCK_M);
  maps.w = operand_b_map<T, Major::MN, BLOCK_N>(p.w, p.K, p.N, p.stride_w, 1);
  maps.xa = matrix_map<T>(p.dyb, p.M, p.R, p.stride_dyb, BLOCK_M);
  maps.b = operand_b_map<T, Major::MN, BLOCK_N>(p.a, p.K, p.R, p.stride_a, 1);
  maps.a = matrix_map<T>(p.b, p.R, p.N, p.stride_b, XaItem<BLOCK_N, kRankSteps>::kColumns);
  maps.y = matrix_map<T>(p.dx, p.M, p.K, p.stride_dx, kWarpgroupRows);

  OneLaunchArguments arguments{};
  set_work<BLOCK_N>(arguments, p.tiling, p.M, p.K, p.N, p.R, p.workspace, p.rounded_b, p.rounded_a);
  arguments.xa = p.dyb;
  arguments.stride_xa = p.stride_dyb;
  set_sum<T, BLOCK_N>(maps, arguments, 0, p.db, p.db_type, p.N, p.dy, p.stride_dy, p.xa, p.stride_xa, p.scale);
  set_sum<T, BLOCK_N>(maps, arguments, 1, p.da, p.da_type, p.K, p.x, p.stride_x, p.dyb, p.stride_dyb, 1.0f);

  arguments.work.chunk = static_cast<int>(std::min<int64_t>(p.sum_rows / BLOCK_M, arguments.order.rows));
  arguments.work.items = arguments.sums[0].column_blocks + arguments.sums[1].column_blocks;
  arguments.partials = static_cast<float*>(p.partials);
  launch_one<T, BLOCK_N, kRankSteps, Major::MN>(maps, arguments, p.tiling, stream);
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
  check_features("N", p.N);
  check_features("K", p.K);
  check_matrix("dy", p.dy, p.N, p.stride_dy);
  check_matrix("w", p.w, p.K, p.stride_w);
  check_matrix("a", p.a, p.K, p.stride_a);
  check_matrix("b", p.b, p.N, p.stride_b);
  check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
  check_matrix("dx", p.dx, p.K, p.stride_dx);
  for (const Type type : {p.da_type, p.db_type}) check_adapter_type(type, p.type);
  if (p.da != nullptr) check_matrix("x", p.x, p.K, p.stride_x);
  if (p.db != nullptr) check_matrix("xa", p.xa, p.R, p.stride_xa);
  if (fused_backward_partials(p) > 0) check_address("partials", p.partials, 16);
  choose_one_launch(p, "backward", [&]<class T>(T, auto block_n, auto steps) {
    launch_kernel<T, block_n, steps>(p, static_cast<Stream>(stream));
  });
}

}  // namespace lorafuse

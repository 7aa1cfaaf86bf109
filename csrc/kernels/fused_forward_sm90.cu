// fused_forward of api_forward.hpp: checks, and from sizes and pointers to a launch of one_launch_kernel.
#include <lorafuse/api_forward.hpp>

#include "checks.hpp"
#include "one_launch_sm90.hpp"

namespace lorafuse {
namespace {

using namespace sm90;

template <class T, int BLOCK_N, int kRankSteps>
void launch_kernel(const FusedForward& p, Stream stream) {
  LinearMaps maps{};
  maps.x = matrix_map<T>(p.x, p.M, p.K, p.stride_x, BLOCK_M);
  maps.w = matrix_map<T>(p.w, p.N, p.K, p.stride_w, BLOCK_N);
  maps.xa = matrix_map<T>(p.xa, p.M, p.R, p.stride_xa, BLOCK_M);
  maps.b = matrix_map<T>(p.b, p.N, p.R, p.stride_b, BLOCK_N);
  maps.a = matrix_map<T>(p.a, p.R, p.K, p.stride_a, XaItem<BLOCK_N, kRankSteps>::kColumns);
  maps.y = matrix_map<T>(p.y, p.M, p.N, p.stride_y, kWarpgroupRows);

  OneLaunchArguments arguments{};
  set_work<BLOCK_N>(arguments, p.tiling, p.M, p.N, p.K, p.R, p.workspace, p.rounded_a, p.rounded_b);
  arguments.bias = p.bias;
  arguments.xa = p.xa;
  arguments.stride_xa = p.stride_xa;
  launch_one<T, BLOCK_N, kRankSteps, Major::K>(maps, arguments, p.tiling, stream);
}

}  // namespace

int64_t fused_forward_workspace(int64_t M) {
  check_size("M", M);
  const int rows = static_cast<int>(ceil_div<int64_t>(M, BLOCK_M));
  // of whatever tiles
  return one_launch_words({{rows, 1, 1}, rows, 0});
}

void fused_forward(const FusedForward& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  if (p.M == 0 || p.N == 0) return;
  check_features("N", p.N);
  check_features("K", p.K);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("w", p.w, p.K, p.stride_w);
  if (p.bias != nullptr) check_address("bias", p.bias, 4);
  check_matrix("a", p.a, p.K, p.stride_a);
  check_matrix("b", p.b, p.R, p.stride_b);
  check_matrix("xa", p.xa, p.R, p.stride_xa);
  check_matrix("y", p.y, p.N, p.stride_y);
  choose_one_launch(p, "forward", [&]<class T>(T, auto block_n, auto steps) {
    launch_kernel<T, block_n, steps>(p, static_cast<Stream>(stream));
  });
}

}  // namespace lorafuse

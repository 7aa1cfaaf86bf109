// api_gated.hpp: checks, and from sizes and pointers to a launch of gated_kernel.
#include <lorafuse/api_gated.hpp>

#include "gated_sm90.cuh"
#include "group_launch.hpp"
#include "linear_launch_sm90.cuh"

namespace lorafuse {
namespace {

using namespace sm90;

void check_activation(Activation activation) {
  const int number = static_cast<int>(activation);
  require(number >= 0 && number < kActivations, "activation ", number, " is not in 0 … ", kActivations - 1);
}
void check_sizes(int64_t M, int64_t N, int64_t K) {
  check_size("M", M);
  check_features("N", N);
  check_features("K", K);
}

// Of both passes: the tiles of M x N, `columns` each, and K-blocks of K and R.
template <int BLOCK_N, class Launch>
GatedArguments arguments(const Launch& of, int64_t R, int columns) {
  using Plan = TicketPlan<BLOCK_M, BLOCK_N>;
  const Tiling& tiling = of.tiling;
  check_tiling(tiling, Plan::Plan::kStageBytes, Plan::bytes(tiling.stages));
  require(tiling.block_m == BLOCK_M, "block_m of ", tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");
  const int64_t rows = ceil_div<int64_t>(of.M, BLOCK_M * tiling.cluster);
  const int64_t tiles = rows * ceil_div<int64_t>(of.N, columns);
  require(tiles < int64_t{1} << 30, tiles, " tiles are more than 2^30");
  GatedArguments p{};
  p.order = {static_cast<int>(rows), static_cast<int>(tiles / rows), std::max(1, tiling.group_m / tiling.cluster)};
  p.stages = tiling.stages;
  p.cluster = tiling.cluster;
  p.workspace = of.workspace;
  p.N = static_cast<int>(of.N);
  p.k_blocks = static_cast<int>(ceil_div<int64_t>(of.K, BLOCK_K));
  p.rank_blocks = static_cast<int>(ceil_div<int64_t>(R, BLOCK_K));
  const int steps = last_rank_steps(R);
  p.last_steps = steps > 2 ? 0 : steps;
  p.whole_blocks = p.k_blocks + p.rank_blocks - (p.last_steps > 0 ? 1 : 0);
  return p;
}

// Ranks of a_down as the products of h take them.
int64_t down_ranks(int64_t R) { return round_up<int64_t>(R, kStepElements); }

void check_down(const GatedForward& p) {
  require(p.R_down >= 1 && p.R_down <= kBoxElements, "R_down of ", p.R_down, "; ha has 1 to ", kBoxElements);
  check_matrix("a_down", p.a_down, p.N, p.stride_a_down);
  check_matrix("ha", p.ha, p.R_down, p.stride_ha);
  check_address("partials", p.partials, 16);
}

template <Pass kPass, class T, int BLOCK_N>
void run(const GatedMaps& maps, const GatedArguments& p, const Tiling& tiling, Stream stream) {
  LaunchConfig config{clusters_launched(tiling, p.order.tiles()) * tiling.cluster, kThreads};
  config.shared_bytes = TicketPlan<BLOCK_M, BLOCK_N>::bytes(tiling.stages);
  config.cluster = tiling.cluster;
  config.overlap_previous = p.overlap_previous;
  launch(gated_kernel<T, BLOCK_N, kPass>, config, stream, maps, p);
}

template <class F>
void choose_tile(Type type, const Tiling& tiling, F&& f) {
  choose_type(type, [&](auto element) {
    choose<128, 256>(tiling.block_n, "block_n", [&](auto block_n) { f(element, block_n); });
  });
}

}  // namespace

int64_t gated_forward_partials(const GatedForward& p) {
  int64_t columns_of_tiles = 0;
  choose<128, 256>(p.tiling.block_n, "block_n",
                   [&](auto block_n) { columns_of_tiles = ceil_div<int64_t>(p.N, block_n / 2); });
  return p.ha == nullptr ? 0 : 4 * columns_of_tiles * p.M * down_ranks(p.R_down);
}

void gated_forward(const GatedForward& p, void* stream) {
  check_activation(p.activation);
  check_sizes(p.M, p.N, p.K);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("gate", p.gate, p.N, p.stride_gate);
  if (p.up != nullptr) check_matrix("up", p.up, p.N, p.stride_up);
  check_matrix("h", p.h, p.N, p.stride_h);
  RoundEach rounded{};
  for (int i = 0; i < 2; ++i) {
    check_size("R", p.R[i]);
    check_matrix("w", p.w[i], p.K, p.stride_w[i]);
    if (p.bias[i] != nullptr) check_address("bias", p.bias[i], 4);
    if (p.R[i] == 0) continue;
    check_matrix("b", p.b[i], p.R[i], p.stride_b[i]);
    rounded.each[i] = p.rounded[i];
  }
  const int64_t R = p.R[0] + p.R[1];
  if (R > 0) check_matrix("xa", p.xa, R, p.stride_xa);
  if (p.ha != nullptr) {
    check_down(p);
    rounded.each[2] = p.rounded[2];
    rounded.each[3] = p.rounded[3];
  }
  check_address("workspace", p.workspace, 4);
  if (p.M == 0) return;
  choose_tile(p.type, p.tiling, [&]<class T, int BLOCK_N>(T, std::integral_constant<int, BLOCK_N>) {
    constexpr int kHalf = BLOCK_N / 2;
    GatedArguments of = arguments<BLOCK_N>(p, R, kHalf);
    GatedMaps maps{};
    maps.x = matrix_map<T>(p.x, p.M, p.K, p.stride_x, BLOCK_M);
    if (R > 0) maps.xa = matrix_map<T>(p.xa, p.M, R, p.stride_xa, BLOCK_M);
    for (int i = 0; i < 2; ++i) {
      maps.w[i] = matrix_map<T>(p.w[i], p.N, p.K, p.stride_w[i], kHalf);
      // a layer without ranks reads the other's left of its first one, which is zeros
      const int ranked = p.R[i] > 0 ? i : 1 - i;
      if (R > 0) maps.b[i] = matrix_map<T>(p.b[ranked], p.N, p.R[ranked], p.stride_b[ranked], kHalf);
      of.first_rank[i] = p.R[i] == 0 ? of.rank_blocks * BLOCK_K : i == 0 ? 0 : static_cast<int>(p.R[0]);
      of.bias[i] = p.bias[i];
    }
    maps.written[0] = matrix_map<T>(p.gate, p.M, p.N, p.stride_gate, kWarpgroupRows);
    if (p.up != nullptr) maps.written[1] = matrix_map<T>(p.up, p.M, p.N, p.stride_up, kWarpgroupRows);
    maps.h = matrix_map<T>(p.h, p.M, p.N, p.stride_h, kWarpgroupRows);
    of.activation = p.activation;
    of.keep_up = p.up != nullptr;
    if (p.ha != nullptr) {
      of.M = static_cast<int>(p.M);
      of.down_ranks = static_cast<int>(down_ranks(p.R_down));
      of.partials = static_cast<float*>(p.partials);
      maps.a_down = matrix_map<T>(p.a_down, p.R_down, p.N, p.stride_a_down, of.down_ranks);
    }
    const auto to = static_cast<Stream>(stream);
    of.overlap_previous = round_each(rounded, p.type, to);
    run<Pass::kForward, T, BLOCK_N>(maps, of, p.tiling, to);
    if (p.ha == nullptr) return;
    add_matrices(of.partials, of.order.columns, p.M, p.R_down, of.down_ranks, p.type, p.ha, p.stride_ha, to);
  });
}

void gated_backward(const GatedBackward& p, void* stream) {
  check_activation(p.activation);
  check_sizes(p.M, p.N, p.K);
  check_size("R", p.R);
  require(p.R >= 1, "R of ", p.R, ": dh has a low-rank product");
  check_matrix("dy", p.dy, p.K, p.stride_dy);
  check_matrix("w", p.w, p.N, p.stride_w);
  check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
  check_matrix("a", p.a, p.N, p.stride_a);
  check_matrix("gate", p.gate, p.N, p.stride_gate);
  check_matrix("up", p.up, p.N, p.stride_up);
  check_matrix("dgate", p.dgate, p.N, p.stride_dgate);
  check_matrix("dup", p.dup, p.N, p.stride_dup);
  check_matrix("h", p.h, p.N, p.stride_h);
  check_address("workspace", p.workspace, 4);
  if (p.M == 0) return;
  choose_tile(p.type, p.tiling, [&]<class T, int BLOCK_N>(T, std::integral_constant<int, BLOCK_N>) {
    GatedArguments of = arguments<BLOCK_N>(p, p.R, BLOCK_N);
    GatedMaps maps{};
    maps.x = matrix_map<T>(p.dy, p.M, p.K, p.stride_dy, BLOCK_M);
    maps.w[0] = operand_b_map<T, Major::MN, BLOCK_N>(p.w, p.N, p.K, p.stride_w, p.tiling.cluster);
    maps.xa = matrix_map<T>(p.dyb, p.M, p.R, p.stride_dyb, BLOCK_M);
    maps.b[0] = operand_b_map<T, Major::MN, BLOCK_N>(p.a, p.N, p.R, p.stride_a, p.tiling.cluster);
    maps.read[0] = matrix_map<T>(p.gate, p.M, p.N, p.stride_gate, BLOCK_M);
    maps.read[1] = matrix_map<T>(p.up, p.M, p.N, p.stride_up, BLOCK_M);
    maps.written[0] = matrix_map<T>(p.dgate, p.M, p.N, p.stride_dgate, kWarpgroupRows);
    maps.written[1] = matrix_map<T>(p.dup, p.M, p.N, p.stride_dup, kWarpgroupRows);
    maps.h = matrix_map<T>(p.h, p.M, p.N, p.stride_h, kWarpgroupRows);
    of.activation = p.activation;
    of.seed = p.seed;
    of.drop_below = p.drop_below;
    const auto to = static_cast<Stream>(stream);
    of.overlap_previous = round_each({{p.rounded}}, p.type, to);
    if (p.seed == nullptr) return run<Pass::kBackward, T, BLOCK_N>(maps, of, p.tiling, to);
    of.whole_blocks -= of.k_blocks;
    run<Pass::kMaskedBackward, T, BLOCK_N>(maps, of, p.tiling, to);
  });
}

}  // namespace lorafuse

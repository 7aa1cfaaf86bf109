// linear of api.hpp: what the sm_90 kernels can run, and which form runs it.
#include "checks.hpp"
#include "linear_launch_sm90.cuh"
#include "xa_items_sm90.cuh"

namespace lorafuse {

namespace {

using sm90::check_features;
using sm90::Form;

// Ranks whose part of da and db is computed in the accumulators of one work item.
constexpr int64_t kMaxItemRank = 64;
// Ranks that tiles compute beside their columns of y: the registers of a thread hold both accumulators.
constexpr int64_t kMaxTileRank = 32;

void check_xa_in_tiles(const Linear& p) {
  require(p.R >= 1 && p.R <= kMaxTileRank, "R of ", p.R, ": one launch computes xa of 1 to ", kMaxTileRank,
          " ranks in its tiles");
  require(!p.transposed, "a launch that computes xa reads w [N, K], not transposed");
  require(!p.overlap_previous, "a launch that computes xa waits for nothing and cannot overlap the one before");
  check_matrix("a", p.a, p.K, p.stride_a);
}

void check_adapter_grads(const Linear& p) {
  require(p.transposed, "da and db are computed in the launch of dx, which is transposed");
  require(p.sum_blocks >= 1, "sum_blocks of ", p.sum_blocks, " compute no da or db; at least 1");
  require(p.R >= 1 && p.R <= kMaxItemRank, "R of ", p.R, ": one launch sums da and db of 1 to ", kMaxItemRank,
          " ranks");
  require(p.seed == nullptr, "blocks that sum da draw no mask");
  for (const Type type : {p.da_type, p.db_type}) check_adapter_type(type, p.type);
  if (p.da != nullptr) check_matrix("layer_x", p.layer_x, p.N, p.stride_layer_x);
  if (p.db != nullptr) check_matrix("layer_xa", p.layer_xa, p.R, p.stride_layer_xa);
}

}  // namespace

int64_t xa_in_tiles_workspace(int64_t M) {
  check_size("M", M);
  return sm90::kFlags + sm90::kWordsOfFlag * ceil_div<int64_t>(M, sm90::BLOCK_M);
}

void linear(const Linear& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  check_size("R", p.R);
  if (p.M == 0 || p.N == 0) return;
  require(p.K > 0, "K of 0 has nothing to multiply");
  check_features("N", p.N);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("w", p.w, p.transposed ? p.N : p.K, p.stride_w);
  check_matrix("y", p.y, p.N, p.stride_y);
  if (p.bias != nullptr) check_address("bias", p.bias, 4);
  if (p.R > 0) {
    check_matrix("xa", p.xa, p.R, p.stride_xa);
    check_matrix("b", p.b, p.transposed ? p.N : p.R, p.stride_b);
  }
  check_address("workspace", p.workspace, 4);
  require(p.seed == nullptr || p.transposed, "the mask is that of dx, which is transposed; project_x masks x");
  const auto launch = [&](void (*launch_form)(const Linear&, Stream)) { launch_form(p, static_cast<Stream>(stream)); };
  if (p.a != nullptr) {
    check_xa_in_tiles(p);
    launch(sm90::launch_xa_tiles);
  } else if (p.da != nullptr || p.db != nullptr) {
    check_adapter_grads(p);
    launch(sm90::launch_linear<Form::kDxAdapterGrads>);
  } else if (!p.transposed) {
    launch(sm90::launch_linear<Form::kForward>);
  } else if (p.seed == nullptr || p.R == 0) {
    launch(sm90::launch_linear<Form::kDx>);
  } else {
    launch(sm90::launch_linear<Form::kDxDropout>);
  }
}

}  // namespace lorafuse

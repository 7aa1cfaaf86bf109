// linear_forward and linear_dx of api.hpp: what the sm_90 kernels can take, and which form runs it.
#include "checks_sm90.hpp"
#include "linear_launch_sm90.cuh"

namespace lorafuse {

namespace {

using sm90::check_address;
using sm90::check_matrix;
using sm90::check_size;
using sm90::Form;
using sm90::LinearProblem;

// Ranks whose xa, or whose part of da and db, is computed in the accumulators of one item.
constexpr int64_t kMaxFusedRank = 64;

void check_sums(const LinearDx& p) {
  require(p.sum_blocks >= 1, "da or db is wanted of ", p.sum_blocks, " blocks");
  require(p.R >= 1 && p.R <= kMaxFusedRank, "R of ", p.R, ": one launch sums da and db of 1 to ", kMaxFusedRank,
          " ranks");
  require(p.seed == nullptr, "blocks that sum da draw no mask");
  for (const Type type : {p.da_type, p.db_type}) {
    require(type == Type::FP32 || type == p.type, "da and db are fp32 or of dy's type");
  }
  if (p.da != nullptr) check_matrix("x", p.x, p.K, p.stride_x);
  if (p.db != nullptr) check_matrix("xa", p.xa, p.R, p.stride_xa);
}

}  // namespace

int64_t forward_workspace(int64_t M) {
  check_size("M", M);
  // a cluster of two has two flags where M ends in its first row block
  return sm90::kFlags + sm90::kWordsOfFlag * round_up<int64_t>(ceil_div<int64_t>(M, sm90::BLOCK_M), 2);
}

void linear_forward(const LinearForward& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  check_size("R", p.R);
  if (p.M == 0 || p.N == 0) return;
  require(p.K > 0, "K of 0 has nothing to multiply");
  require(p.N % 8 == 0, "N of ", p.N, " is not a multiple of 8");
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("w", p.w, p.K, p.stride_w);
  check_matrix("y", p.y, p.N, p.stride_y);
  if (p.bias != nullptr) check_address("bias", p.bias, 4);
  const bool fused = p.a != nullptr;
  if (p.R > 0) {
    check_matrix("xa", p.xa, p.R, p.stride_xa);
    check_matrix("b", p.b, p.R, p.stride_b);
  }
  LinearProblem problem{.type = p.type, .M = p.M, .N = p.N, .K = p.K, .R = p.R,
                        .x = p.x, .stride_x = p.stride_x, .w = p.w, .stride_w = p.stride_w,
                        .xa = p.xa, .stride_xa = p.stride_xa, .b = p.b, .stride_b = p.stride_b,
                        .y = p.y, .stride_y = p.stride_y, .tiling = p.tiling};
  problem.bias = p.bias;
  problem.overlap_previous = p.overlap_previous;
  if (!fused) {
    sm90::launch_linear<Form::kForward>(problem, static_cast<Stream>(stream));
    return;
  }
  require(p.R >= 1 && p.R <= kMaxFusedRank, "R of ", p.R, ": one launch computes xa of 1 to ", kMaxFusedRank, " ranks");
  require(!p.overlap_previous, "a launch that computes xa waits for nothing and cannot overlap the one before");
  require(p.workspace != nullptr, "workspace is null");
  check_matrix("a", p.a, p.K, p.stride_a);
  problem.a = p.a;
  problem.stride_a = p.stride_a;
  problem.workspace = p.workspace;
  sm90::launch_linear<Form::kForwardFused>(problem, static_cast<Stream>(stream));
}

void linear_dx(const LinearDx& p, void* stream) {
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  check_size("R", p.R);
  if (p.M == 0 || p.K == 0) return;
  require(p.N > 0, "N of 0 has nothing to multiply");
  require(p.K % 8 == 0, "K of ", p.K, " is not a multiple of 8");
  check_matrix("dy", p.dy, p.N, p.stride_dy);
  check_matrix("w", p.w, p.K, p.stride_w);
  check_matrix("dx", p.dx, p.K, p.stride_dx);
  if (p.R > 0) {
    check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
    check_matrix("a", p.a, p.K, p.stride_a);
  }
  LinearProblem problem{.type = p.type, .M = p.M, .N = p.K, .K = p.N, .R = p.R,
                        .x = p.dy, .stride_x = p.stride_dy, .w = p.w, .stride_w = p.stride_w,
                        .xa = p.dyb, .stride_xa = p.stride_dyb, .b = p.a, .stride_b = p.stride_a,
                        .y = p.dx, .stride_y = p.stride_dx, .tiling = p.tiling};
  problem.overlap_previous = p.overlap_previous;
  if (p.da != nullptr || p.db != nullptr) {
    check_sums(p);
    problem.beside = &p;
    sm90::launch_linear<Form::kDxBeside>(problem, static_cast<Stream>(stream));
    return;
  }
  if (p.seed == nullptr || p.R == 0) {
    sm90::launch_linear<Form::kDx>(problem, static_cast<Stream>(stream));
    return;
  }
  problem.seed = p.seed;
  problem.drop_below = p.drop_below;
  sm90::launch_linear<Form::kDxDropout>(problem, static_cast<Stream>(stream));
}

}  // namespace lorafuse

// The whole forward of a layer in one launch. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api.hpp>

namespace lorafuse {

// y = x wᵀ + bias + xa bᵀ and xa = x aᵀ: x [M, K], w [N, K], bias [N] or null, xa [M, R] with columns in [R, stride_xa)
// zero, y [M, N], R at most 64. `a` [R, K] and `b` [N, R], which is scale · b, are of x's type: memory that the launch
// writes by `rounded_a` and `rounded_b`, or adapters that are there (then `out` is null). `workspace`:
// fused_forward_workspace(M) zeroed words, which the launch leaves zeroed. Clusters of 1. Not yet measured on a GPU;
// `lorafuse tune` can choose it.
struct FusedForward {
  Type type;
  int64_t M, N, K, R;
  const void* x;
  int64_t stride_x;
  const void* w;
  int64_t stride_w;
  const void* bias = nullptr;
  const void* a;
  int64_t stride_a;
  const void* b;
  int64_t stride_b;
  void* xa;
  int64_t stride_xa;
  void* y;
  int64_t stride_y;
  Round rounded_a = {}, rounded_b = {};
  uint32_t* workspace;
  Tiling tiling;
};
int64_t fused_forward_workspace(int64_t M);
void fused_forward(const FusedForward& p, void* stream);

}  // namespace lorafuse

// The whole backward of a layer in one launch. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api.hpp>

namespace lorafuse {

// dx = dy w + dyb a, da = dybᵀ x and db = scale · dyᵀ xa with dyb = scale · dy b, for y = x wᵀ + scale · (x aᵀ) bᵀ:
// dy [M, N], w [N, K], x [M, K], xa [M, R], R at most 64; da [R, K] or db [N, R], or both, null are not computed. `a`
// [R, K] and `b` [R, N], which is scale · b transposed, are of x's type: memory that the launch writes by `rounded_a` and
// `rounded_b`, or adapters that are there (then `out` is null). `dyb` is memory for it. `workspace`:
// fused_backward_workspace(M, N, K) zeroed words, which the launch leaves zeroed. Rows are summed in chunks of `sum_rows`,
// a multiple of 128; where they are several, `partials` is memory of fused_backward_partials(p) bytes. Clusters of 1.
// Not yet measured on a GPU; `lorafuse tune` can choose it.
struct FusedBackward {
  Type type;
  int64_t M, N, K, R;
  const void* dy;
  int64_t stride_dy;
  const void* w;
  int64_t stride_w;
  const void* a;
  int64_t stride_a;
  const void* b;
  int64_t stride_b;
  float scale = 1.0f;
  void* dyb;
  int64_t stride_dyb;
  void* dx;
  int64_t stride_dx;
  const void* x = nullptr;
  int64_t stride_x = 0;
  void* da = nullptr;
  Type da_type = Type::FP32;
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  void* db = nullptr;
  Type db_type = Type::FP32;
  Round rounded_a = {}, rounded_b = {};
  int64_t sum_rows = 2048;
  void* partials = nullptr;
  uint32_t* workspace;
  Tiling tiling;
};
int64_t fused_backward_workspace(int64_t M, int64_t N, int64_t K);
int64_t fused_backward_partials(const FusedBackward& p);
void fused_backward(const FusedBackward& p, void* stream);

}  // namespace lorafuse

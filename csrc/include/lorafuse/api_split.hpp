// A layer of few tiles in one launch, each by a cluster of blocks. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api.hpp>

namespace lorafuse {

// y = x wᵀ + bias + scale · xa bᵀ and xa = x aᵀ: x [M, K], w [N, K], bias [N] or null, a [R, K] of a_type, b [N, R] of
// b_type, xa [M, R] with columns in [R, stride_xa) zero, y [M, N]; R at most 32. `splits` blocks, 2 or 4, divide K, which
// has as many blocks of 64 at least. Tiles of 128 x 128, tiling.cluster is not used. Not yet measured on a GPU;
// `lorafuse tune` can choose it.
struct SplitLinear {
  Type type, a_type, b_type;
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
  float scale = 1.0f;
  void* xa;
  int64_t stride_xa;
  void* y;
  int64_t stride_y;
  int splits = 4;
  Tiling tiling;
};
void split_linear(const SplitLinear& p, void* stream);

}  // namespace lorafuse

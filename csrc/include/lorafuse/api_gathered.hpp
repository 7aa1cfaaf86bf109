// Ragged rows that lie anywhere in x, their tiles handed out by ticket. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api_gated.hpp>

namespace lorafuse {

// GroupedLinear of api.hpp, but for three things. Row s of the groups is row order[s] / choices of x [., K], where
// `order` [rows] is not null: choices of tokens as a router sorts them by expert, of which no copy is made; xa [rows, R],
// none for R 0, and y are in the order of the groups. Blocks draw their tiles from `workspace`, one zeroed word that the
// launch leaves zeroed. And where `h` is not null, w, b, bias and y have 2 N columns, of gate and then of up, and
// h [rows, N] is their activation, of what y holds; with an order, in tiles of 128 x 256.
//
// Where `u` [rows, 2 N] is not null either, its gate and up are those of the layer before, and the product, of N columns
// and without bias, is dh. Then y [rows, 2 N] is the gradient of u for row_scale[s] · dh, of dh where `row_scale`
// [rows] is null; h is computed again; and `products` [columns of tiles, rows], where it is not null, is ⟨dh, h⟩ of each
// row over the 256 columns of each tile, without row_scale. No plan chooses it: not yet measured on a GPU.
struct GatheredLinear {
  Type type;
  int64_t rows, groups, N, K;
  int64_t R = 0;
  bool transposed = false;
  const int64_t* offsets;
  const int64_t* order = nullptr;
  int64_t choices = 1;
  const void* x;
  int64_t stride_x;
  const void* w;
  const void* bias = nullptr;
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  const void* b = nullptr;
  void* y;
  int64_t stride_y;
  uint32_t* workspace;
  Activation activation = Activation::SILU;
  void* h = nullptr;
  int64_t stride_h = 0;
  const void* u = nullptr;
  int64_t stride_u = 0;
  const float* row_scale = nullptr;
  float* products = nullptr;
  Tiling tiling;
};
void gathered_linear(const GatheredLinear& p, void* stream);

// Of the same rows the products with the rank, both from one read of `wide` [., C], whose rows lie as those of x above:
// projected [rows, R] = wide b[g] of b [groups, C, R], and outer [groups, C, R] = scale · Σ wideᵀ narrow, [groups, R, C]
// where `transposed`, of narrow [rows, R]; zeros for a group without rows. Either may be null; R is a multiple of 8, and
// `type` of 16 bits that of wide, b, narrow and projected. Rows of no group hold anything. No plan chooses it: not yet
// measured on a GPU.
struct RaggedRanks {
  Type type;
  int64_t rows, groups, C, R;
  const int64_t* offsets;
  const int64_t* order = nullptr;
  int64_t choices = 1;
  const void* wide;
  int64_t stride_wide;
  const void* b = nullptr;
  void* projected = nullptr;
  int64_t stride_projected = 0;
  const void* narrow = nullptr;
  int64_t stride_narrow = 0;
  void* outer = nullptr;
  Type outer_type = Type::FP32;
  bool transposed = false;
  float scale = 1.0f;
  void* workspace = nullptr;
};
// Bytes of `workspace`, from a 16-byte boundary.
int64_t ragged_ranks_workspace(const RaggedRanks& p);
void ragged_ranks(const RaggedRanks& p, void* stream);

}  // namespace lorafuse

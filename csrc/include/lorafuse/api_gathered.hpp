// Ragged rows that lie anywhere in x, their tiles handed out by ticket. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api_gated.hpp>

namespace lorafuse {

// GroupedLinear of api.hpp, but for three things. Row s of the groups is row order[s] / choices of x [., K], where
// `order` [rows] is not null: choices of tokens as a router sorts them by expert, of which no copy is made; xa [rows, R],
// none for R 0, and y are in the order of the groups. Blocks draw their tiles from `workspace`, one zeroed word that the
// launch leaves zeroed. And where `h` is not null, w, b, bias and y have 2 N columns, of gate and then of up, and
// h [rows, N] is their activation, of what y holds; with an order, in tiles of 128 x 256. No plan chooses it: not yet
// measured on a GPU.
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
  Tiling tiling;
};
void gathered_linear(const GatheredLinear& p, void* stream);

}  // namespace lorafuse

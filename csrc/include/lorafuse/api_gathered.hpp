// Ragged rows that lie anywhere in x, their tiles handed out by ticket. Conventions as in api.hpp.
#pragma once

#include <lorafuse/api.hpp>

namespace lorafuse {

// GroupedLinear of api.hpp, but for two things: row s of the groups is row order[s] / choices of x [., K], where `order`
// [rows] is not null (choices of tokens as a router sorts them by expert; no copy of x is made), and blocks draw their
// tiles from `workspace`, one zeroed word that the launch leaves zeroed. xa [rows, R], R of 0 is none, and y are in the
// order of the groups. No plan chooses it: not yet measured on a GPU.
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
  Tiling tiling;
};
void gathered_linear(const GatheredLinear& p, void* stream);

}  // namespace lorafuse

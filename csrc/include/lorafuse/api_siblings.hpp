// Layers of one x in one launch each way. Conventions as in api.hpp; layer i has entry i of each array, and the entries
// from `count` on are not read.
#pragma once

#include <array>

#include <lorafuse/api.hpp>

namespace lorafuse {

// Layers of one x in one launch.
constexpr int kMostSiblings = 4;

template <class T>
using Each = std::array<T, kMostSiblings>;

// y_i = x w_iᵀ + bias_i + xa_i b_iᵀ of `count` layers, 1 to 4: x [M, K], w_i [N_i, K], bias_i [N_i] or null, xa_i
// [M, R_i], b_i [N_i, R_i] with the scale inside, y_i [M, N_i]; R_i 0: the product alone. `rounded`: adapters that a
// launch before the product writes, where `out` is not null; the product overlaps it. Not yet measured on a GPU;
// `lorafuse tune` can choose it.
struct SiblingsForward {
  Type type;
  int count;
  int64_t M, K;
  Each<int64_t> N, R = {};
  const void* x;
  int64_t stride_x;
  Each<const void*> w;
  Each<int64_t> stride_w;
  Each<const void*> bias = {};
  Each<const void*> xa = {};
  Each<int64_t> stride_xa = {};
  Each<const void*> b = {};
  Each<int64_t> stride_b = {};
  Each<void*> y;
  Each<int64_t> stride_y;
  Each<Round> rounded = {};
  Tiling tiling;
  uint32_t* workspace;  // as in Linear
};
void siblings_forward(const SiblingsForward& p, void* stream);

// dx = Σ_i dy_i w_i + Σ_j mask_j ⊙ (dyb_j a_j) in one accumulation: dy_i [M, N_i], w_i [N_i, K], dx [M, K]. Of the `lows`
// low-rank products, dyb_j [M, R_j] and a_j [R_j, K], one at most has no seed and no mask, that of all layers without
// dropout; masks are those of Linear. `rounded` as above, of each a.
struct SiblingsDx {
  Type type;
  int count;
  int64_t M, K;
  Each<int64_t> N;
  Each<const void*> dy;
  Each<int64_t> stride_dy;
  Each<const void*> w;
  Each<int64_t> stride_w;
  int lows = 0;
  Each<int64_t> R = {};
  Each<const void*> dyb = {};
  Each<int64_t> stride_dyb = {};
  Each<const void*> a = {};
  Each<int64_t> stride_a = {};
  Each<const int64_t*> seed = {};
  Each<uint32_t> drop_below = {};
  Each<Round> rounded = {};
  void* dx;
  int64_t stride_dx;
  Tiling tiling;
  uint32_t* workspace;  // as in Linear
};
void siblings_dx(const SiblingsDx& p, void* stream);

}  // namespace lorafuse

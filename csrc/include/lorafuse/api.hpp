// What the bindings call: one struct of pointers and sizes a kernel, and the function that launches it on a stream.
//
// Matrices are row-major; strides are elements between rows, sizes elements. `x` and everything of its element type is
// BF16 or FP16; adapters are of that type or fp32. Fields without an initializer are required. Every function checks its
// arguments, throws std::invalid_argument with the value and the rule, and waits for nothing. The emulator implements
// the same functions from the same kernels, with host pointers.
#pragma once

#include <cstdint>

namespace lorafuse {

enum class Type : int { BF16 = 0, FP16 = 1, FP32 = 2 };

// How the sm_90 kernels cut their work; lorafuse/plan/configs_cuda.py states what is legal.
struct Tiling {
  int block_n = 256;  // columns of a tile, 128 or 256
  int stages = 3;     // of the ring
  int cluster = 2;    // blocks that share their tile of w, 1 or 2
  int group_m = 16;   // row blocks that are walked together
  int sms = 0;        // blocks launched at most; 0: those of the device
  int block_m = 128;  // rows of a tile; grouped_linear runs 64, with 256 columns, too
};

// y = x wᵀ + bias + xa bᵀ: x [M, K], w [N, K], bias [N] or null, xa [M, R], b [N, R] with the scale inside, y [M, N].
// R 0: the product alone. `transposed`: y = x w + mask ⊙ (xa b) with w [K, N] and b [R, N], the gradient of a layer's
// input, in which x is dy, xa is dyb, b is the layer's a, and N and K are the layer's K and N.
struct Linear {
  Type type;
  int64_t M, N, K;
  int64_t R = 0;
  bool transposed = false;
  const void* x;
  int64_t stride_x;
  const void* w;
  int64_t stride_w;
  const void* bias = nullptr;
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  const void* b = nullptr;
  int64_t stride_b = 0;
  void* y;
  int64_t stride_y;
  // xa was written by the launch before this one, which it may overlap
  bool overlap_previous = false;
  Tiling tiling;
  // a word, zero before the launch and after it, from which blocks draw their tiles; of no other launch that may run at
  // the same time
  uint32_t* workspace;

  // xa in tiles, not transposed: with `a` [R, K] the launch computes xa too and writes it, by the tiles of the first
  // columns of y, where they pass over x in any case. R at most 32, clusters of 1, and xa_in_tiles_workspace(M) words of
  // workspace. For few columns of tiles (N 1024); not yet measured on a GPU.
  const void* a = nullptr;
  int64_t stride_a = 0;

  // Dropout, transposed. `seed` not null: the mask is that of lorafuse.philox for y [M, N], and keeps an element where
  // its draw is at least drop_below.
  const int64_t* seed = nullptr;
  uint32_t drop_below = 0;

  // Gradients of the adapters, transposed: with `da` or `db`, `sum_blocks` blocks of the launch first compute
  // da [R, N] = xaᵀ layer_x and db [K, R] = scale · xᵀ layer_xa, layer_x [M, N] and layer_xa [M, R] being those of the
  // layer's forward. R at most 64, clusters of 1, no mask. Not yet measured on a GPU; `lorafuse tune` can choose it.
  int sum_blocks = 0;
  const void* layer_x = nullptr;
  int64_t stride_layer_x = 0;
  void* da = nullptr;
  Type da_type = Type::FP32;
  const void* layer_xa = nullptr;
  int64_t stride_layer_xa = 0;
  void* db = nullptr;
  Type db_type = Type::FP32;
  float scale = 1.0f;
};
int64_t xa_in_tiles_workspace(int64_t M);
void linear(const Linear& p, void* stream);

// Linear for groups of ragged rows: group g has rows offsets[g - 1] … offsets[g]. w [G, N, K], b [G, N, R], bias [G, N],
// contiguous within a group ([G, K, N] and [G, R, N] where `transposed`); rows of no group are not written. No plan
// chooses it: it took 5.6 ms where Triton's takes 3.2 (H200, an expert block of Qwen3-30B-A3B); grouped CUDA kernels for
// decode and fp8 build on it.
struct GroupedLinear {
  Type type;
  int64_t rows, groups, N, K;
  int64_t R = 0;
  bool transposed = false;
  const int64_t* offsets;
  const void* x;
  int64_t stride_x;
  const void* w;
  const void* bias = nullptr;
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  const void* b = nullptr;
  void* y;
  int64_t stride_y;
  bool overlap_previous = false;
  Tiling tiling;
  uint32_t* workspace;  // as in Linear
};
void grouped_linear(const GroupedLinear& p, void* stream);

// The memory-bound passes, sm_80 and later.

// out[r, c] = scale · in[r, c], or in[c, r] where `transposed`, in `type`, zero for columns in [columns, stride_out): an
// adapter [rows, columns] as the products read it. In the launch of another pass, `out` null is none.
struct Round {
  Type in_type, type;
  bool transposed = false;
  int64_t rows, columns;
  const void* in;
  int64_t stride_in;
  float scale = 1.0f;
  void* out = nullptr;
  int64_t stride_out;
};
void round_adapter(const Round& p, void* stream);

// xa = drop(x) aᵀ: x [M, K], a [R, K] of a_type, xa [M, R], columns in [R, stride_xa) zero. The mask as in Linear.
// `rounded`: an adapter of the product that follows, in the same launch.
struct ProjectX {
  Type type, a_type;
  int64_t M, K, R;
  const void* x;
  int64_t stride_x;
  const void* a;
  int64_t stride_a;
  void* xa;
  int64_t stride_xa;
  const int64_t* seed = nullptr;
  uint32_t drop_below = 0;
  Round rounded = {};
};
void project_x(const ProjectX& p, void* stream);

// One read of dy [M, N] for dyb = scale · dy b, db = scale · dyᵀ xa and dbias = Σ dy: b [N, R] of b_type, xa [M, R],
// dyb [M, R] in `type` with columns in [R, stride_dyb) zero, db [N, R] of b_type, dbias [N] in `type`; each of the three
// may be null. `workspace`: reduce_dy_workspace(p) bytes of fp32 partial sums, which are added in a fixed order. Those of
// dyb are ceil(N / 256) M R: where they would take more than `dyb_bytes`, rows are taken in chunks, one after the other.
// `rounded` as in ProjectX.
struct ReduceDy {
  Type type, b_type;
  int64_t M, N, R;
  const void* dy;
  int64_t stride_dy;
  const void* b = nullptr;
  int64_t stride_b = 0;
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  float scale = 1.0f;
  void* dyb = nullptr;
  int64_t stride_dyb = 0;
  void* db = nullptr;
  void* dbias = nullptr;
  void* workspace = nullptr;
  int64_t dyb_bytes = int64_t{64} << 20;
  int sms = 0;
  Round rounded = {};
};
int64_t reduce_dy_workspace(const ReduceDy& p);
void reduce_dy(const ReduceDy& p, void* stream);

// da = dybᵀ drop(x): dyb [M, R] with the scale inside, x [M, K], da [R, K] of a_type; workspace and mask as above.
struct ReduceX {
  Type type, a_type;
  int64_t M, K, R;
  const void* x;
  int64_t stride_x;
  const void* dyb;
  int64_t stride_dyb;
  void* da;
  const int64_t* seed = nullptr;
  uint32_t drop_below = 0;
  void* workspace = nullptr;
  int sms = 0;
};
int64_t reduce_x_workspace(const ReduceX& p);
void reduce_x(const ReduceX& p, void* stream);

}  // namespace lorafuse

// What the bindings call: one struct of pointers and sizes a kernel, and the function that launches it on a stream.
//
// Matrices are row-major; strides are elements between rows, sizes elements. `x` and everything of its element type is
// BF16 or FP16; adapters are of that type or fp32. Every function checks what it was given, throws
// std::invalid_argument with the value and the rule, and waits for nothing. The emulator implements the same functions
// from the same kernels, with host pointers.
#pragma once

#include <cstdint>

namespace lorafuse {

enum class Type : int { BF16 = 0, FP16 = 1, FP32 = 2 };

// How the sm_90 kernels cut their work; plan/config.py says what is legal.
struct Tiling {
  int block_n = 256;  // columns of a tile, 128 or 256
  int stages = 3;     // of the ring
  int cluster = 2;    // blocks that share their tile of w, 1 or 2
  int group_m = 16;   // row blocks that are walked together
  int sms = 0;        // blocks launched at most; 0: those of the device
  int block_m = 128;  // rows of a tile; grouped_linear takes 64, with 256 columns, too
};

// y = x wᵀ + bias + xa bᵀ: x [M, K], w [N, K], bias [N] or null, xa [M, R], b [N, R] with the scale inside, y [M, N].
// R 0: the bare product. `a` [R, K] not null: xa is computed by the same launch and written to xa; `workspace` then
// holds forward_workspace(M) zeroed words, which the launch leaves zeroed.
struct LinearForward {
  Type type;
  int64_t M, N, K, R;
  const void* x;
  int64_t stride_x;
  const void* w;
  int64_t stride_w;
  const void* bias;
  const void* a;
  int64_t stride_a;
  void* xa;
  int64_t stride_xa;
  const void* b;
  int64_t stride_b;
  void* y;
  int64_t stride_y;
  uint32_t* workspace;
  // xa was written by the launch before this one, which it may overlap
  bool overlap_previous;
  Tiling tiling;
};
int64_t forward_workspace(int64_t M);
void linear_forward(const LinearForward& p, void* stream);

// dx = dy w + mask ⊙ (dyb a): dy [M, N], w [N, K], dyb [M, R] with the scale inside, a [R, K], dx [M, K]. `seed` not
// null: the mask is that of lorafuse.philox for x [M, K], an element is kept where its draw is at least drop_below.
// `da` [R, K] or `db` [N, R] not null: `sum_blocks` blocks of the launch compute da = dybᵀ x and db = scale · dyᵀ xa
// meanwhile, of x [M, K] and xa [M, R]; with R at most 64, clusters of 1 and no mask.
struct LinearDx {
  Type type;
  int64_t M, N, K, R;
  const void* dy;
  int64_t stride_dy;
  const void* w;
  int64_t stride_w;
  const void* dyb;
  int64_t stride_dyb;
  const void* a;
  int64_t stride_a;
  void* dx;
  int64_t stride_dx;
  const int64_t* seed;
  uint32_t drop_below;
  bool overlap_previous;
  Tiling tiling;
  int sum_blocks;
  const void* x;
  int64_t stride_x;
  void* da;
  Type da_type;
  const void* xa;
  int64_t stride_xa;
  void* db;
  Type db_type;
  float scale;
};
void linear_dx(const LinearDx& p, void* stream);

// Groups of ragged rows: those of group g are ends[g - 1] … ends[g]. w [G, N, K], b [G, N, R], bias [G, N], contiguous
// within a group; rows of no group are not written. Transposed as in LinearDx: y[s] = x[s] w[g] + xa[s] b[g] with w
// [G, K, N] and b [G, R, N].
struct GroupedLinear {
  Type type;
  int64_t rows, groups, N, K, R;
  bool transposed;
  const int64_t* ends;
  const void* x;
  int64_t stride_x;
  const void* w;
  const void* bias;
  const void* xa;
  int64_t stride_xa;
  const void* b;
  int64_t stride_b;
  void* y;
  int64_t stride_y;
  bool overlap_previous;
  Tiling tiling;
};
void grouped_linear(const GroupedLinear& p, void* stream);

// The memory-bound passes, sm_80 and later.

// out[r, c] = scale · in[r, c], or in[c, r] where `transposed`, in `type`, zero for columns in [columns, stride_out): an
// adapter [rows, columns] as the products take it. Beside another pass, `out` null is none.
struct Round {
  Type in_type, type;
  bool transposed;
  int64_t rows, columns;
  const void* in;
  int64_t stride_in;
  float scale;
  void* out;
  int64_t stride_out;
};
void round_adapter(const Round& p, void* stream);

// xa = drop(x) aᵀ: x [M, K], a [R, K] of a_type, xa [M, R], columns in [R, stride_xa) zero. The mask as in LinearDx.
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
  const int64_t* seed;
  uint32_t drop_below;
  Round rounded;
};
void project_x(const ProjectX& p, void* stream);

// One read of dy [M, N] for dyb = scale · dy b, db = scale · dyᵀ xa and dbias = Σ dy: b [N, R] of b_type, xa [M, R],
// dyb [M, R] in `type` with columns in [R, stride_dyb) zero, db [N, R] of b_type, dbias [N] in `type`; each of the three
// may be null. `workspace`: reduce_dy_workspace(p) bytes of fp32 partial sums, which are added in a fixed order.
// `rounded` as in ProjectX.
struct ReduceDy {
  Type type, b_type;
  int64_t M, N, R;
  const void* dy;
  int64_t stride_dy;
  const void* b;
  int64_t stride_b;
  const void* xa;
  int64_t stride_xa;
  float scale;
  void* dyb;
  int64_t stride_dyb;
  void* db;
  void* dbias;
  void* workspace;
  int sms;
  Round rounded;
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
  const int64_t* seed;
  uint32_t drop_below;
  void* workspace;
  int sms;
};
int64_t reduce_x_workspace(const ReduceX& p);
void reduce_x(const ReduceX& p, void* stream);

}  // namespace lorafuse

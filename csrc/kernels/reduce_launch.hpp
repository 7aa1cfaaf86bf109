// Host: how a reduction of the backward pass is cut into blocks, and where its partial sums lie.
#pragma once

#include <algorithm>

#include <lorafuse/ptx/launch.cuh>

#include "dispatch.hpp"
#include "reduce_sm80.cuh"
#include "round_checks.hpp"

namespace lorafuse::skinny {

// GPUs give a block 163 KB of shared memory or more (sm_80, sm_87, sm_90, sm_100), or 99 KB (sm_86, sm_89, sm_120).
inline bool has_large_blocks() { return shared_memory_limit() >= 163 * 1024; }
// Ranks that a block takes at a time.
inline int rank_tile(int64_t R, bool large) { return R <= 16 ? 16 : R <= 32 || !large ? 32 : 64; }

inline void check_sizes(int64_t M, int64_t columns, int64_t R) {
  require(M >= 1 && columns >= 1 && R >= 1, "sizes ", M, ", ", columns, " and rank ", R, " must be positive");
  require(M < int64_t{1} << 31 && columns < int64_t{1} << 31 && R < int64_t{1} << 31, "sizes ", M, ", ", columns,
          " and rank ", R, " must be below 2^31");
}

// Columns of a block of the reduction. 512 in 32 rows, with fewer partial sums, made a backward of 8192 x 4096, R 16,
// 20 us longer (H200, 2026-11-26).
constexpr int kReduceN = 256;

// What a launch of the reduction is made of. Partials lie in the workspace in the order rows, columns, bias.
struct ReducePlan {
  int ranks, block_m;
  int64_t row_floats, column_floats, bias_floats;

  int64_t bytes() const { return 4 * (row_floats + column_floats + bias_floats); }
};

// Fills in of `r` what follows from the sizes and from what is requested, for one shape of block.
inline ReducePlan plan_shape(Reduce& r, int ranks, int block_m, int sms) {
  ReducePlan plan{ranks, block_m, 0, 0, 0};
  const int64_t row_blocks = ceil_div<int64_t>(r.M, block_m), column_blocks = ceil_div<int64_t>(r.C, kReduceN);
  require(row_blocks * column_blocks < int64_t{1} << 31, "a matrix of ", r.M, " rows and ", r.C,
          " columns has too many blocks");
  const int items = static_cast<int>(row_blocks * column_blocks);
  r.block_n = kReduceN;
  r.row_blocks = static_cast<int>(row_blocks);
  r.column_blocks = static_cast<int>(column_blocks);
  r.rank_tiles = static_cast<int>(ceil_div<int64_t>(r.R, plan.ranks));
  // two items a block at least, so that small problems have few partials
  const int resident = sms / r.rank_tiles > 1 ? sms / r.rank_tiles : 1, enough = ceil_div(items, 2);
  r.shares = {items, resident < enough ? resident : enough};
  r.pitch = round_up<int64_t>(r.R, 2);
  const int64_t slots = r.shares.blocks + column_blocks - 1;
  if (r.rows_out) plan.row_floats = column_blocks * r.M * r.pitch;
  if (r.columns_out) plan.column_floats = slots * kReduceN * r.pitch;
  if (r.bias_out) plan.bias_floats = slots * kReduceN;
  return plan;
}

// 64 × 256 blocks; 32 × 256 where shared memory is small.
inline ReducePlan plan_reduce(Reduce& r, int sms) {
  require(sms >= 0, "number of multiprocessors ", sms, " is negative");
  if (sms == 0) sms = multiprocessors();
  const bool large = has_large_blocks();
  return plan_shape(r, rank_tile(r.R, large), large ? 64 : 32, sms);
}

// Rows of dy that one launch takes: all, or a chunk of which dyb's partial sums take `most` bytes at most, or are of 64
// rows. Chunks are about alike.
inline int64_t chunk_rows(const Reduce& r, int64_t most) {
  constexpr int64_t kRows = 64;
  const int64_t bytes = 4 * kRows * ceil_div<int64_t>(r.C, kReduceN) * round_up<int64_t>(r.R, 2);
  const int64_t blocks = ceil_div(r.M, kRows), chunks = ceil_div(blocks, std::max<int64_t>(1, most / bytes));
  return r.rows_out && chunks > 1 ? ceil_div(blocks, chunks) * kRows : r.M;
}

// Floats behind the partial sums of a launch, where chunks carry on what they have summed.
inline int64_t carried_floats(const Reduce& r, int64_t rows) {
  return rows == r.M ? 0 : (r.columns_out ? r.C * r.R : 0) + (r.bias_out ? r.C : 0);
}

// Where the partial sums of a launch lie.
inline void place(Reduce& r, const ReducePlan& plan, void* workspace) {
  check_address("workspace", workspace, 16);
  r.rows = static_cast<float*>(workspace);
  r.columns = r.rows + plan.row_floats;
  r.bias = r.bias_out ? r.columns + plan.column_floats : nullptr;
}

// Blocks that add them.
inline int64_t sum_blocks(const Reduce& r) {
  const auto blocks = [](int64_t size) { return ceil_div<int64_t>(size, kThreads); };
  return (r.rows_out ? blocks(r.M * r.row_columns) : 0) + (r.columns_out ? blocks(r.C * r.R) : 0) +
         (r.bias_out ? blocks(r.C) : 0) + blocks(round_chunks(r.rounded));
}

inline Reduce reduce_of(const ReduceDy& p) {
  check_sizes(p.M, p.N, p.R);
  Reduce r{};
  r.M = p.M;
  r.C = p.N;
  r.R = p.R;
  r.left = p.dy;
  r.stride_left = p.stride_dy;
  r.right = p.db ? p.xa : nullptr;
  r.stride_right = p.stride_xa;
  r.b = p.dyb ? p.b : nullptr;
  r.stride_b = p.stride_b;
  r.b_fp32 = p.b_type == Type::FP32;
  r.scale = p.scale;
  r.rows_out = p.dyb;
  r.stride_rows_out = p.stride_dyb;
  r.row_columns = p.stride_dyb;
  r.columns_out = p.db;
  r.columns_fp32 = r.b_fp32;
  r.bias_out = p.dbias;
  r.rounded = p.rounded;
  return r;
}

inline void check_operands(const ReduceDy& p) {
  check_matrix("dy", p.dy, p.N, p.stride_dy);
  if (p.dyb) {
    check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
    require(p.b != nullptr, "b is null, and dyb needs it");
    check_stride("b", p.R, p.stride_b);
  }
  if (p.db) check_matrix("xa", p.xa, p.R, p.stride_xa);
  check_round(p.rounded, p.type);
  check_adapter_type(p.b_type, p.type);
}

// A launch over `rows` rows after the other, in skinny_sm80.cu.
void run_reduction(const Reduce& all, Type type, int64_t rows, int sms, void* workspace, Stream stream);

}  // namespace lorafuse::skinny

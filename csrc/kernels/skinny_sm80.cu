// Host side of the memory-bound passes of api.hpp: checks, shapes, launches.
#include <algorithm>

#include <lorafuse/ptx/launch.cuh>

#include "checks.hpp"
#include "dispatch.hpp"
#include "project_sm80.cuh"
#include "reduce_sm80.cuh"
#include "round_checks.hpp"

namespace lorafuse {
namespace {

using namespace skinny;

// GPUs give a block 163 KB of shared memory or more (sm_80, sm_87, sm_90, sm_100), or 99 KB (sm_86, sm_89, sm_120).
bool has_large_blocks() { return shared_memory_limit() >= 163 * 1024; }
// Ranks that a block takes at a time.
int rank_tile(int64_t R, bool large) { return R <= 16 ? 16 : R <= 32 || !large ? 32 : 64; }

void check_sizes(int64_t M, int64_t columns, int64_t R) {
  require(M >= 1 && columns >= 1 && R >= 1, "sizes ", M, ", ", columns, " and rank ", R, " must be positive");
  require(M < int64_t{1} << 31 && columns < int64_t{1} << 31 && R < int64_t{1} << 31, "sizes ", M, ", ", columns,
          " and rank ", R, " must be below 2^31");
}

template <class T, class A, int BLOCK_M, int RANKS>
void launch_project(const ProjectX& p, Stream stream) {
  using S = ProjectShape<T, A, BLOCK_M, RANKS>;
  const int64_t blocks = ceil_div<int64_t>(p.M, BLOCK_M) * ceil_div<int64_t>(p.R, RANKS) +
                         ceil_div<int64_t>(round_chunks(p.rounded), kThreads);
  LaunchConfig config{grid_size(blocks), kThreads, S::kSharedBytes};
  launch(project_kernel<T, A, BLOCK_M, RANKS>, config, stream, p);
}

// What an SM takes in, in units of a row of x: 64-row blocks share `a` better, 16-row blocks fill more SMs.
double project_cost(const ProjectX& p, int ranks, int block_m, int sms) {
  const double blocks = static_cast<double>(ceil_div<int64_t>(p.M, block_m) * ceil_div<int64_t>(p.R, ranks));
  const double a_rows = static_cast<double>(p.R < ranks ? p.R : ranks) * (p.a_type == Type::FP32 ? 2 : 1);
  return (block_m + a_rows) * (blocks > sms ? blocks / sms : 1.0);
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
ReducePlan plan_shape(Reduce& r, int ranks, int block_m, int sms) {
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
ReducePlan plan_reduce(Reduce& r, int sms) {
  require(sms >= 0, "number of multiprocessors ", sms, " is negative");
  if (sms == 0) sms = multiprocessors();
  const bool large = has_large_blocks();
  return plan_shape(r, rank_tile(r.R, large), large ? 64 : 32, sms);
}

// Rows of dy that one launch takes: all, or a chunk of which dyb's partial sums take `most` bytes at most, or are of 64
// rows. Chunks are about alike.
int64_t chunk_rows(const Reduce& r, int64_t most) {
  constexpr int64_t kRows = 64;
  const int64_t bytes = 4 * kRows * ceil_div<int64_t>(r.C, kReduceN) * round_up<int64_t>(r.R, 2);
  const int64_t blocks = ceil_div(r.M, kRows), chunks = ceil_div(blocks, std::max<int64_t>(1, most / bytes));
  return r.rows_out && chunks > 1 ? ceil_div(blocks, chunks) * kRows : r.M;
}

// Floats behind the partial sums of a launch, where chunks carry on what they have summed.
int64_t carried_floats(const Reduce& r, int64_t rows) {
  return rows == r.M ? 0 : (r.columns_out ? r.C * r.R : 0) + (r.bias_out ? r.C : 0);
}

template <class T, int BLOCK_M, int RANKS>
void launch_reduce(const Reduce& r, Stream stream) {
  using S = ReduceShape<T, BLOCK_M, kReduceN, RANKS>;
  LaunchConfig config{grid_size(static_cast<int64_t>(r.shares.blocks) * r.rank_tiles), kThreads, S::kSharedBytes};
  launch(reduce_kernel<T, BLOCK_M, kReduceN, RANKS>, config, stream, r);
}

template <class T>
void run_reduce(Reduce& r, const ReducePlan& plan, void* workspace, Stream stream) {
  check_address("workspace", workspace, 16);
  r.rows = static_cast<float*>(workspace);
  r.columns = r.rows + plan.row_floats;
  r.bias = r.bias_out ? r.columns + plan.column_floats : nullptr;
  choose<16, 32, 64>(plan.ranks, "rank tile", [&](auto ranks) {
    if constexpr (ranks <= 32) {
      if (plan.block_m == 32) return launch_reduce<T, 32, ranks>(r, stream);
    }
    launch_reduce<T, 64, ranks>(r, stream);
  });
  const auto blocks = [](int64_t size) { return ceil_div<int64_t>(size, kThreads); };
  const int64_t sums = (r.rows_out ? blocks(r.M * r.stride_rows_out) : 0) + (r.columns_out ? blocks(r.C * r.R) : 0) +
                       (r.bias_out ? blocks(r.C) : 0) + blocks(round_chunks(r.rounded));
  launch(sum_kernel<T>, LaunchConfig{grid_size(sums), kThreads}, stream, r);
}

// A launch over `rows` rows after the other.
template <class T>
void run_chunks(const Reduce& all, int64_t rows, int sms, void* workspace, Stream stream) {
  const auto at = [](const void* matrix, int64_t element) -> const void* {
    return matrix ? static_cast<const T*>(matrix) + element : nullptr;
  };
  float* carried = nullptr;
  for (int64_t row = 0; row < all.M; row += rows) {
    Reduce r = all;
    r.M = std::min(rows, all.M - row);
    r.left = at(all.left, row * all.stride_left);
    r.right = at(all.right, row * all.stride_right);
    r.rows_out = const_cast<void*>(at(all.rows_out, row * all.stride_rows_out));
    r.is_first = row == 0;
    r.is_last = row + r.M == all.M;
    // once, in the launch that the product follows
    if (!r.is_last) r.rounded.out = nullptr;
    const ReducePlan plan = plan_reduce(r, sms);
    // the first chunk is the largest
    if (r.is_first) carried = static_cast<float*>(workspace) + plan.bytes() / 4;
    r.carried_columns = carried;
    r.carried_bias = carried + (all.columns_out ? all.C * all.R : 0);
    run_reduce<T>(r, plan, workspace, stream);
  }
}

Reduce reduce_of(const ReduceDy& p) {
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
  r.columns_out = p.db;
  r.columns_fp32 = r.b_fp32;
  r.bias_out = p.dbias;
  r.rounded = p.rounded;
  return r;
}

Reduce reduce_of(const ReduceX& p) {
  check_sizes(p.M, p.K, p.R);
  Reduce r{};
  r.M = p.M;
  r.C = p.K;
  r.R = p.R;
  r.left = p.x;
  r.stride_left = p.stride_x;
  r.right = p.dyb;
  r.stride_right = p.stride_dyb;
  r.seed = p.seed;
  r.drop_below = p.drop_below;
  r.scale = 1.0f;
  r.columns_out = p.da;
  r.columns_fp32 = p.a_type == Type::FP32;
  r.transposed = true;
  return r;
}

}  // namespace

void project_x(const ProjectX& p, void* stream) {
  check_sizes(p.M, p.K, p.R);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("a", p.a, p.K, p.stride_a, p.a_type == Type::FP32 ? 4 : 2);
  check_matrix("xa", p.xa, p.R, p.stride_xa);
  check_round(p.rounded, p.type);
  const int sms = multiprocessors(), tile = rank_tile(p.R, has_large_blocks());
  const bool tall = project_cost(p, tile, 64, sms) <= project_cost(p, tile, 16, sms);
  check_adapter_type(p.a_type, p.type);
  choose_type(p.type, [&]<class T>(T) {
    choose<16, 32, 64>(tile, "rank tile", [&](auto ranks) {
      const auto launch_with = [&]<class A>(A) {
        const auto launch_tile = tall ? launch_project<T, A, 64, ranks> : launch_project<T, A, 16, ranks>;
        launch_tile(p, static_cast<Stream>(stream));
      };
      p.a_type == Type::FP32 ? launch_with(float{}) : launch_with(T{});
    });
  });
}

int64_t reduce_dy_workspace(const ReduceDy& p) {
  Reduce r = reduce_of(p);
  const int64_t rows = chunk_rows(r, p.dyb_bytes), carried = carried_floats(r, rows);
  r.M = rows;
  return plan_reduce(r, p.sms).bytes() + 4 * carried;
}

void reduce_dy(const ReduceDy& p, void* stream) {
  const Reduce r = reduce_of(p);
  if (!p.dyb && !p.db && !p.dbias) return;
  check_matrix("dy", p.dy, p.N, p.stride_dy);
  if (p.dyb) {
    check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
    require(p.b != nullptr, "b is null, and dyb needs it");
    check_stride("b", p.R, p.stride_b);
  }
  if (p.db) check_matrix("xa", p.xa, p.R, p.stride_xa);
  check_round(p.rounded, p.type);
  check_adapter_type(p.b_type, p.type);
  const int64_t rows = chunk_rows(r, p.dyb_bytes);
  choose_type(p.type,
              [&]<class T>(T) { run_chunks<T>(r, rows, p.sms, p.workspace, static_cast<Stream>(stream)); });
}

int64_t reduce_x_workspace(const ReduceX& p) {
  Reduce r = reduce_of(p);
  return plan_reduce(r, p.sms).bytes();
}

void reduce_x(const ReduceX& p, void* stream) {
  Reduce r = reduce_of(p);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("dyb", p.dyb, p.R, p.stride_dyb);
  require(p.da != nullptr, "da is null");
  const ReducePlan plan = plan_reduce(r, p.sms);
  check_adapter_type(p.a_type, p.type);
  choose_type(p.type, [&]<class T>(T) { run_reduce<T>(r, plan, p.workspace, static_cast<Stream>(stream)); });
}

}  // namespace lorafuse

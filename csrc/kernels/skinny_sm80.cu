// Host side of the memory-bound passes of api.hpp: checks, shapes, launches.
#include <algorithm>

#include <lorafuse/ptx/launch.cuh>

#include "group_launch.hpp"
#include "project_sm80.cuh"
#include "reduce_launch.hpp"

namespace lorafuse {
namespace {

using namespace skinny;

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

template <class T, int BLOCK_M, int RANKS>
void launch_reduce(const Reduce& r, Stream stream) {
  using S = ReduceShape<T, BLOCK_M, kReduceN, RANKS>;
  LaunchConfig config{grid_size(static_cast<int64_t>(r.shares.blocks) * r.rank_tiles), kThreads, S::kSharedBytes};
  launch(reduce_kernel<T, BLOCK_M, kReduceN, RANKS>, config, stream, r);
}

template <class T>
void run_reduce(Reduce& r, const ReducePlan& plan, void* workspace, Stream stream) {
  place(r, plan, workspace);
  choose<16, 32, 64>(plan.ranks, "rank tile", [&](auto ranks) {
    if constexpr (ranks <= 32) {
      if (plan.block_m == 32) return launch_reduce<T, 32, ranks>(r, stream);
    }
    launch_reduce<T, 64, ranks>(r, stream);
  });
  launch(sum_kernel<T>, LaunchConfig{grid_size(sum_blocks(r)), kThreads}, stream, r);
}

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

namespace skinny {

void run_reduction(const Reduce& all, Type type, int64_t rows, int sms, void* workspace, Stream stream) {
  choose_type(type, [&]<class T>(T) { run_chunks<T>(all, rows, sms, workspace, stream); });
}

}  // namespace skinny

void add_matrices(const float* matrices, int count, int64_t M, int64_t R, int64_t pitch, Type type, void* out,
                  int64_t stride, Stream stream) {
  Reduce r{};
  r.M = M;
  r.R = R;
  r.rows = const_cast<float*>(matrices);
  r.column_blocks = count;
  r.pitch = pitch;
  r.scale = 1.0f;
  r.rows_out = out;
  r.stride_rows_out = r.row_columns = stride;
  choose_type(type, [&]<class T>(T) {
    launch(sum_kernel<T>, LaunchConfig{grid_size(sum_blocks(r)), kThreads}, stream, r);
  });
}

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
  check_operands(p);
  const int64_t rows = chunk_rows(r, p.dyb_bytes);
  run_reduction(r, p.type, rows, p.sms, p.workspace, static_cast<Stream>(stream));
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

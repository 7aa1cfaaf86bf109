// Host: from sizes and pointers to a launch of linear_kernel. Instantiated form by form, in linear_*_sm90.cu.
#pragma once

#include <algorithm>

#include <lorafuse/tensor_maps.cuh>

#include "checks.hpp"
#include "dispatch.hpp"
#include "linear_sm90.cuh"

namespace lorafuse::sm90 {

// Of matrices whose rows TMA reads one after the other.
inline void check_features(const char* name, int64_t features) {
  check_size(name, features);
  require(features >= 8 && features % 8 == 0, name, " of ", features, " is not a positive multiple of 8");
}

inline void check_tiling(const Tiling& tiling, int stage_bytes, int shared_bytes) {
  require(tiling.stages >= 2, "a ring of ", tiling.stages, " stages; it needs 2");
  require(shared_bytes <= kMaxSharedBytes, tiling.stages, " stages of ", stage_bytes, " bytes need ", shared_bytes,
          " bytes of shared memory; a block has ", kMaxSharedBytes);
  require(tiling.cluster == 1 || tiling.cluster == 2, "clusters of ", tiling.cluster, " blocks; they have 1 or 2");
  require(tiling.group_m >= 1, "group_m of ", tiling.group_m, "; it is at least 1");
  require(tiling.sms >= 0, "sms of ", tiling.sms, "; it is at least 0");
}

// Clusters that are launched: one for each of `work`, as many as there are multiprocessors for at most. Products draw
// their work by ticket: where fewer are resident at a time, the others start when those have nothing left to draw.
inline int clusters_launched(const Tiling& tiling, int64_t work) {
  const int sms = tiling.sms > 0 ? tiling.sms : multiprocessors();
  require(sms >= tiling.cluster, sms, " multiprocessors hold no cluster of ", tiling.cluster);
  return static_cast<int>(std::min<int64_t>(sms / tiling.cluster, work));
}

template <class T>
TensorMap matrix_map(const void* base, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  return tensor_map<T, 2>(base, {columns, rows}, {stride * 2}, {kBoxElements, box_rows});
}
// An operand B of the product, [columns, reduction] (K-major) or [reduction, columns] (MN-major).
template <class T, Major kMajor, int BLOCK_N>
TensorMap operand_b_map(const void* base, int64_t columns, int64_t reduction, int64_t stride, int cluster) {
  if (kMajor == Major::K) return matrix_map<T>(base, columns, reduction, stride, BLOCK_N / cluster);
  return matrix_map<T>(base, reduction, columns, stride, BLOCK_K);
}

// Sum `i` of a launch, 0 db and 1 da, where it has a place: columns[c, r] = scale Σ_m wide[m, c] narrow[m, r].
template <class T, int BLOCK_N>
void set_sum(LinearMaps& maps, LinearArguments& arguments, int i, void* out, Type type, int64_t C, const void* wide,
             int64_t stride_wide, const void* narrow, int64_t stride_narrow, float scale) {
  if (out == nullptr) return;
  const int blocks = static_cast<int>(ceil_div<int64_t>(C, BLOCK_N));
  arguments.sums[i] = {static_cast<int>(C), blocks, out, type == Type::FP32, i == 1, scale};
  maps.sums[i] = {matrix_map<T>(wide, arguments.M, C, stride_wide, BLOCK_K),
                  matrix_map<T>(narrow, arguments.M, arguments.R, stride_narrow, BLOCK_K)};
}

template <class T, int BLOCK_N, int kRankSteps, Form kForm>
void launch_linear_kernel(const Linear& p, Stream stream) {
  constexpr Major kMajor = kMajorOfB<kForm>;
  using Plan = TicketPlan<BLOCK_M, BLOCK_N>;
  const int cluster = p.tiling.cluster;
  check_tiling(p.tiling, Plan::Plan::kStageBytes, Plan::bytes(p.tiling.stages));
  require(p.tiling.block_m == BLOCK_M, "block_m of ", p.tiling.block_m, "; dense tiles have ", BLOCK_M, " rows");

  LinearMaps maps{};
  maps.x = matrix_map<T>(p.x, p.M, p.K, p.stride_x, BLOCK_M);
  maps.w = operand_b_map<T, kMajor, BLOCK_N>(p.w, p.N, p.K, p.stride_w, cluster);
  maps.y = matrix_map<T>(p.y, p.M, p.N, p.stride_y, kWarpgroupRows);
  if (kRankSteps > 0) {
    maps.xa = matrix_map<T>(p.xa, p.M, p.R, p.stride_xa, BLOCK_M);
    maps.b = operand_b_map<T, kMajor, BLOCK_N>(p.b, p.N, p.R, p.stride_b, cluster);
  }

  LinearArguments arguments{};
  arguments.M = static_cast<int>(p.M);
  arguments.N = static_cast<int>(p.N);
  arguments.R = static_cast<int>(p.R);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  arguments.rank_blocks = static_cast<int>(ceil_div<int64_t>(p.R, BLOCK_K));
  const int rows = static_cast<int>(ceil_div<int64_t>(p.M, BLOCK_M * cluster));
  arguments.order = {rows, static_cast<int>(ceil_div<int64_t>(p.N, BLOCK_N)), std::max(1, p.tiling.group_m / cluster)};
  arguments.stages = p.tiling.stages;
  arguments.cluster = cluster;
  arguments.bias = p.bias;
  arguments.workspace = p.workspace;
  arguments.overlap_previous = p.overlap_previous;
  arguments.seed = p.seed;
  arguments.drop_below = p.drop_below;

  const int64_t tiles = int64_t{rows} * arguments.order.columns;
  require(tiles < int64_t{1} << 30, tiles, " tiles are more than 2^30");
  if constexpr (kForm == Form::kDxAdapterGrads) {
    require(cluster == 1, "clusters of ", cluster, " blocks in a launch that computes da or db; they have 1");
    set_sum<T, BLOCK_N>(maps, arguments, 0, p.db, p.db_type, p.K, p.x, p.stride_x, p.layer_xa, p.stride_layer_xa,
                        p.scale);
    set_sum<T, BLOCK_N>(maps, arguments, 1, p.da, p.da_type, p.N, p.layer_x, p.stride_layer_x, p.xa, p.stride_xa, 1.0f);
    // a block for each item at most
    const int items = arguments.sums[0].column_blocks + arguments.sums[1].column_blocks;
    arguments.sum_blocks = clusters_launched(p.tiling, std::min(p.sum_blocks, items));
  }

  LaunchConfig config{clusters_launched(p.tiling, tiles + arguments.sum_blocks) * cluster, kThreads};
  config.shared_bytes = Plan::bytes(p.tiling.stages);
  config.cluster = cluster;
  // without ranks nothing in the kernel waits
  config.overlap_previous = p.overlap_previous && kRankSteps > 0;
  launch(linear_kernel<T, BLOCK_N, kRankSteps, kForm>, config, stream, maps, arguments);
}

// Steps of 16 ranks that the last K-block of the ranks issues.
inline int last_rank_steps(int64_t R) {
  return R == 0 ? 0 : static_cast<int>(ceil_div<int64_t>(R - (R - 1) / BLOCK_K * BLOCK_K, kStepElements));
}

template <Form kForm>
void launch_linear(const Linear& p, Stream stream) {
  choose_type(p.type, [&]<class T>(T) {
    choose<128, 256>(p.tiling.block_n, "block_n", [&](auto block_n) {
      const auto launch_steps = [&](auto steps) { launch_linear_kernel<T, block_n, steps, kForm>(p, stream); };
      const int last = last_rank_steps(p.R);
      if constexpr (kForm == Form::kDxDropout) {
        // 1 or 4, of which the last multiply zeros: drawing the mask costs more, and compiling a kernel takes long
        choose<1, 4>(last == 1 ? 1 : 4, "rank steps", launch_steps);
      } else if constexpr (kForm == Form::kDxAdapterGrads) {
        choose<1, 2, 3, 4>(last, "rank steps", launch_steps);
      } else {
        choose<0, 1, 2, 3, 4>(last, "rank steps", launch_steps);
      }
    });
  });
}

// xa_tiles_sm90.cu
void launch_xa_tiles(const Linear& p, Stream stream);

extern template void launch_linear<Form::kForward>(const Linear&, Stream);
extern template void launch_linear<Form::kDx>(const Linear&, Stream);
extern template void launch_linear<Form::kDxAdapterGrads>(const Linear&, Stream);
extern template void launch_linear<Form::kDxDropout>(const Linear&, Stream);

}  // namespace lorafuse::sm90

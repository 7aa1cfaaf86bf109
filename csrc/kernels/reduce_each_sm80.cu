// The reductions over dy of several layers in one launch, and their partial sums in another: checks, kernels, launches.
//
// A table holds what each layer's launches would be given. The blocks of all are one grid, layer after layer, and each does
// what the same block of its layer's own launch would: no bit differs, and there is one last wave.
#include <lorafuse/api_reduce.hpp>

#include "reduce_launch.hpp"

namespace lorafuse {
namespace skinny {

struct ReduceTable {
  Reduce each[kMostSiblings];
  // of each layer, in either launch
  int reduce_blocks[kMostSiblings], sum_blocks[kMostSiblings];
};

// The layer of a block of the grid; `block` becomes its number among that layer's.
LF_DEVICE int layer_of(const int (&blocks)[kMostSiblings], int& block) {
  int layer = 0;
  while (block >= blocks[layer]) block -= blocks[layer++];
  return layer;
}

template <class T, int BLOCK_M, int BLOCK_N, int RANKS>
LF_KERNEL_SHARED(kThreads, 1) reduce_each_kernel(LF_GRID_CONSTANT ReduceTable p) {
  LF_DYNAMIC_SHARED(shared);
  int block = static_cast<int>(blockIdx.x);
  const int layer = layer_of(p.reduce_blocks, block);
  reduce_block<T, BLOCK_M, BLOCK_N, RANKS>(p.each[layer], block, shared);
}

template <class T>
LF_KERNEL_SHARED(kThreads, 4) sum_each_kernel(LF_GRID_CONSTANT ReduceTable p) {
  int block = static_cast<int>(blockIdx.x);
  const int layer = layer_of(p.sum_blocks, block);
  sum_block<T>(p.each[layer], block);
}

}  // namespace skinny

namespace {

using namespace skinny;

void check_count(int count) {
  require(count >= 1 && count <= kMostSiblings, count, " layers in one launch; there are 1 to ", kMostSiblings);
}

// What reduce_dy would be given of a layer.
ReduceDy layer(const ReduceEach& p, int i) {
  ReduceDy one{};
  one.type = p.type;
  one.b_type = p.b_type[i];
  one.M = p.M;
  one.N = p.N[i];
  one.R = p.R[i];
  one.dy = p.dy[i];
  one.stride_dy = p.stride_dy[i];
  one.b = p.b[i];
  one.stride_b = p.stride_b[i];
  one.xa = p.xa[i];
  one.stride_xa = p.stride_xa[i];
  one.scale = p.scale[i];
  one.dyb = p.dyb[i];
  one.stride_dyb = p.stride_dyb[i];
  one.db = p.db[i];
  one.dbias = p.dbias[i];
  return one;
}

// Layers of one launch, each one's partial sums behind those of the others.
struct Together {
  int count = 0, ranks = 16, block_m = 64;
  int64_t bytes = 0, bytes_of_dyb = 0;
  int64_t reduce_blocks = 0, sum_blocks = 0;
  ReducePlan plans[kMostSiblings];
  ReduceTable table{};

  void add(const Reduce& r, const ReducePlan& plan) {
    // a wider tile of ranks has as many blocks, which do the same
    ranks = std::max(ranks, plan.ranks);
    block_m = plan.block_m;
    bytes += round_up<int64_t>(plan.bytes(), 16);
    bytes_of_dyb += 4 * plan.row_floats;
    reduce_blocks += int64_t{r.shares.blocks} * r.rank_tiles;
    sum_blocks += skinny::sum_blocks(r);
    // whether they fit an int is checked of the sums
    table.reduce_blocks[count] = static_cast<int>(int64_t{r.shares.blocks} * r.rank_tiles);
    table.sum_blocks[count] = static_cast<int>(skinny::sum_blocks(r));
    plans[count] = plan;
    table.each[count++] = r;
  }
};

template <class T, int BLOCK_M, int RANKS>
void launch_table(const Together& p, Stream stream) {
  using S = ReduceShape<T, BLOCK_M, kReduceN, RANKS>;
  const LaunchConfig config{grid_size(p.reduce_blocks), kThreads, S::kSharedBytes};
  launch(reduce_each_kernel<T, BLOCK_M, kReduceN, RANKS>, config, stream, p.table);
  launch(sum_each_kernel<T>, LaunchConfig{grid_size(p.sum_blocks), kThreads}, stream, p.table);
}

void run_together(Together& p, Type type, void* workspace, Stream stream) {
  for (int i = 0; i < p.count; ++i) {
    place(p.table.each[i], p.plans[i], workspace);
    workspace = static_cast<uint8_t*>(workspace) + round_up<int64_t>(p.plans[i].bytes(), 16);
  }
  choose_type(type, [&]<class T>(T) {
    choose<16, 32, 64>(p.ranks, "rank tile", [&](auto ranks) {
      if constexpr (ranks <= 32) {
        if (p.block_m == 32) return launch_table<T, 32, ranks>(p, stream);
      }
      launch_table<T, 64, ranks>(p, stream);
    });
  });
}

// Calls together(layers of a launch), and for a layer that has launches of its own alone(its reduction, rows of a chunk).
template <class F, class G>
void for_each_launch(const ReduceEach& p, F&& together, G&& alone) {
  Together launch;
  const auto finish = [&] {
    if (launch.count == 1) alone(launch.table.each[0], p.M);
    if (launch.count > 1) together(launch);
    launch = {};
  };
  for (int i = 0; i < p.count; ++i) {
    Reduce r = reduce_of(layer(p, i));
    r.row_columns = round_up<int64_t>(r.R, 8);
    if (const int64_t rows = chunk_rows(r, p.dyb_bytes); rows < p.M) {
      finish();
      alone(r, rows);
      continue;
    }
    const ReducePlan plan = plan_reduce(r, p.sms);
    if (launch.bytes_of_dyb + 4 * plan.row_floats > p.dyb_bytes) finish();
    launch.add(r, plan);
  }
  finish();
}

}  // namespace

int64_t reduce_each_workspace(const ReduceEach& p) {
  check_count(p.count);
  int64_t bytes = 0;
  for_each_launch(
      p, [&](const Together& launch) { bytes = std::max(bytes, launch.bytes); },
      [&](Reduce r, int64_t rows) {
        const int64_t carried = carried_floats(r, rows);
        r.M = rows;
        bytes = std::max(bytes, plan_reduce(r, p.sms).bytes() + 4 * carried);
      });
  return bytes;
}

void reduce_each(const ReduceEach& p, void* stream) {
  check_count(p.count);
  for (int i = 0; i < p.count; ++i) {
    require(p.dyb[i] || p.db[i] || p.dbias[i], "layer ", i, " has neither dyb nor db nor dbias");
    check_operands(layer(p, i));
  }
  const auto to = static_cast<Stream>(stream);
  for_each_launch(
      p, [&](Together& launch) { run_together(launch, p.type, p.workspace, to); },
      [&](const Reduce& r, int64_t rows) { run_reduction(r, p.type, rows, p.sms, p.workspace, to); });
}

}  // namespace lorafuse

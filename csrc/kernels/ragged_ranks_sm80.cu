// ragged_ranks of api_gathered.hpp: checks, and from sizes and pointers to the launches.
#include <lorafuse/api_gathered.hpp>
#include <lorafuse/ptx/launch.cuh>

#include "checks.hpp"
#include "dispatch.hpp"
#include "ragged_ranks_sm80.cuh"
#include "round_checks.hpp"

namespace lorafuse {
namespace {

using namespace skinny;

constexpr int64_t kColumns = RaggedShape<BF16, 16>::BLOCK_N;

template <class T, int RANKS>
void launch_ranks(const RaggedReduce& p, int64_t groups, Stream stream) {
  const Reduce& of = p.reduce;
  LaunchConfig config{grid_size(groups * of.column_blocks * of.rank_tiles), kThreads,
                      RaggedShape<T, RANKS>::kSharedBytes};
  launch(ragged_ranks_kernel<T, RANKS>, config, stream, p);
  if (of.rows_out == nullptr) return;
  // rows alone, of which projected is not scaled
  Reduce sums = of;
  sums.columns_out = nullptr;
  sums.scale = 1.0f;
  launch(sum_kernel<T>, LaunchConfig{grid_size(ceil_div<int64_t>(of.M * of.row_columns, kThreads)), kThreads},
         stream, sums);
}

}  // namespace

int64_t ragged_ranks_workspace(const RaggedRanks& p) {
  return p.projected == nullptr ? 0 : 4 * ceil_div<int64_t>(p.C, kColumns) * p.rows * p.R;
}

void ragged_ranks(const RaggedRanks& p, void* stream) {
  check_size("rows", p.rows);
  check_size("groups", p.groups);
  check_size("C", p.C);
  check_size("R", p.R);
  if (p.groups == 0 || p.C == 0 || p.R == 0) return;
  require(p.R % 8 == 0, "R of ", p.R, " is not a multiple of 8");
  require(p.type != Type::FP32, "rows of fp32: they are of 16 bits");
  require(p.choices >= 1 && p.choices < int64_t{1} << 31, "choices of ", p.choices, "; a token has at least 1");
  require(p.order != nullptr || p.choices == 1, "choices of ", p.choices, " without an order");
  require(p.projected != nullptr || p.outer != nullptr, "neither projected nor outer");
  check_address("offsets", p.offsets, 8);
  if (p.order != nullptr) check_address("order", p.order, 8);
  if (p.rows > 0) check_matrix("wide", p.wide, p.C, p.stride_wide);
  RaggedReduce launched{};
  Reduce& of = launched.reduce;
  if (p.projected != nullptr) {
    check_matrix("b", p.b, p.R, p.R);
    if (p.rows > 0) {
      check_matrix("projected", p.projected, p.R, p.stride_projected);
      check_address("workspace", p.workspace, 16);
    }
    of.b = p.b;
    of.stride_b = p.R;
    of.rows = static_cast<float*>(p.workspace);
    of.pitch = p.R;
    // none has rows: the second launch would be empty
    of.rows_out = p.rows > 0 ? p.projected : nullptr;
    of.stride_rows_out = p.stride_projected;
    of.row_columns = p.stride_projected;
  }
  if (p.outer != nullptr) {
    if (p.rows > 0) check_matrix("narrow", p.narrow, p.R, p.stride_narrow);
    check_address("outer", p.outer, 4);
    // of no rows none is read
    of.right = p.rows > 0 ? p.narrow : p.outer;
    of.stride_right = p.stride_narrow;
    of.columns_out = p.outer;
    of.columns_fp32 = p.outer_type == Type::FP32;
    of.transposed = p.transposed;
    of.scale = p.scale;
  }
  const int ranks = p.R <= 16 ? 16 : 32;
  of.M = p.rows;
  of.C = p.C;
  of.R = p.R;
  of.left = p.wide;
  of.stride_left = p.stride_wide;
  of.column_blocks = static_cast<int>(ceil_div<int64_t>(p.C, kColumns));
  of.rank_tiles = static_cast<int>(ceil_div<int64_t>(p.R, ranks));
  launched.offsets = p.offsets;
  launched.order = p.order;
  launched.choices = static_cast<int>(p.choices);
  choose_type(p.type, [&]<class T>(T) {
    choose<16, 32>(ranks, "rank tile",
                   [&](auto tile) { launch_ranks<T, tile>(launched, p.groups, static_cast<Stream>(stream)); });
  });
}

}  // namespace lorafuse

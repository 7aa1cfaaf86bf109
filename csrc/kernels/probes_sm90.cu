// The kernels of api_probes.hpp.
#include <lorafuse/api_probes.hpp>

#include "checks.hpp"
#include "linear_launch_sm90.cuh"

namespace lorafuse {
namespace sm90 {

constexpr int BLOCK_N = 256;
constexpr int kStages = 3;
constexpr int kColumns = 16;
constexpr int kColumnBytes = kColumns * kBoxRowBytes;
// of the boxes of the extra columns, one a stage: the 1024-byte boundary after everything else
constexpr int kExtraOffset = round_up(SharedPlan<BLOCK_M, BLOCK_N>::bytes(kStages) - 1024, 1024);

struct ProbeMaps {
  TensorMap x, w, a, y;
};
struct ProbeArguments {
  int M, k_blocks;
  TileOrder order;
  void* xa;
};

// The main loop of linear_kernel without ranks; with kExtra sixteen more columns of B in each stage.
template <bool kExtra>
LF_KERNEL(kThreads)
probe_columns_kernel(LF_GRID_CONSTANT ProbeMaps maps, LF_GRID_CONSTANT ProbeArguments p) {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, kStages, 1);
  uint8_t* const extra = pipeline.base + kExtraOffset;
  const int warp = start_block(maps.x, maps.w, [&] { pipeline.initialize(); });

  if (warp < 4) {
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      for (int index = blockIdx.x; index < p.order.tiles(); index += gridDim.x) {
        const Tile tile = p.order.at(index);
        for (int block = 0; block < p.k_blocks; ++block) {
          pipeline.acquire(Plan::kStageBytes + (kExtra ? kColumnBytes : 0));
          ptx::tma_load(pipeline.a(), &maps.x, block * BLOCK_K, tile.row * BLOCK_M, pipeline.full());
          ptx::tma_load(pipeline.b(), &maps.w, block * BLOCK_K, tile.column * BLOCK_N, pipeline.full());
          if constexpr (kExtra) {
            ptx::tma_load(extra + pipeline.stage * kColumnBytes, &maps.a, block * BLOCK_K, 0, pipeline.full());
          }
          pipeline.advance();
        }
      }
    }
  } else {
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    for (int index = blockIdx.x; index < p.order.tiles(); index += gridDim.x) {
      const Tile tile = p.order.at(index);
      const int row = tile.row * BLOCK_M + part.row;
      float d[BLOCK_N / 2], xa[kColumns / 2];
      for (int block = 0; block < p.k_blocks; ++block) {
        begin_stage(pipeline);
        const uint8_t* x = pipeline.a() + part.row * kBoxRowBytes;
        multiply<BF16, BLOCK_N, Major::K, kStepsOfBlock>(d, x, pipeline.b(), block > 0);
        if constexpr (kExtra) {
          multiply<BF16, kColumns, Major::K, kStepsOfBlock>(xa, x, extra + pipeline.stage * kColumnBytes, block > 0);
        }
        end_stage(pipeline, lane, block > 0);
      }
      finish_blocks(pipeline, lane);
      if constexpr (kExtra) {
        if (tile.column == 0) {
          store_rows<BF16, kColumns>(xa, static_cast<BF16*>(p.xa), kColumns, row, p.M, 0, kColumns, thread);
        }
      }
      store_tile<BF16, BLOCK_N>(d, &maps.y, pipeline.output(consumer), row, tile.column * BLOCK_N, consumer, thread);
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
}

LF_KERNEL(32)
probe_flags_kernel(LF_GRID_CONSTANT ProbeFlags p) {
  if (threadIdx.x != 0) return;
  const int block = blockIdx.x;
  for (uint32_t round = 1; round <= p.rounds; ++round) {
    // block 0 begins each round
    ptx::wait_at_least(p.words + 1 - block, block == 0 ? round - 1 : round);
    ptx::store_global(p.words + 2, ptx::load_global(p.words + 2) + 1);
    ptx::add_release(p.words + block, 1);
  }
}

}  // namespace sm90

void probe_columns(const ProbeColumns& p, void* stream) {
  using namespace sm90;
  check_size("M", p.M);
  check_size("N", p.N);
  check_size("K", p.K);
  require(p.M > 0 && p.N > 0 && p.K > 0, "M, N or K is 0");
  check_matrix("x", p.x, p.K, p.K);
  check_matrix("w", p.w, p.K, p.K);
  check_matrix("y", p.y, p.N, p.N);
  if (p.a != nullptr) check_matrix("a", p.a, p.K, p.K);
  require((p.a == nullptr) == (p.xa == nullptr), "a and xa are given together or not at all");

  ProbeMaps maps{};
  maps.x = matrix_map<BF16>(p.x, p.M, p.K, p.K, BLOCK_M);
  maps.w = matrix_map<BF16>(p.w, p.N, p.K, p.K, BLOCK_N);
  maps.y = matrix_map<BF16>(p.y, p.M, p.N, p.N, kWarpgroupRows);
  if (p.a != nullptr) maps.a = matrix_map<BF16>(p.a, kColumns, p.K, p.K, kColumns);
  ProbeArguments arguments{};
  arguments.M = static_cast<int>(p.M);
  arguments.k_blocks = static_cast<int>(ceil_div<int64_t>(p.K, BLOCK_K));
  arguments.order = {static_cast<int>(ceil_div<int64_t>(p.M, BLOCK_M)),
                     static_cast<int>(ceil_div<int64_t>(p.N, BLOCK_N)), 16};
  arguments.xa = p.xa;
  const Tiling tiling{.cluster = 1, .sms = p.sms};
  LaunchConfig config{clusters_launched(tiling, arguments.order.tiles()), kThreads};
  config.shared_bytes = round_up(SharedPlan<BLOCK_M, BLOCK_N>::bytes(kStages), 1024) + kStages * kColumnBytes;
  const auto kernel = p.a != nullptr ? probe_columns_kernel<true> : probe_columns_kernel<false>;
  launch(kernel, config, static_cast<Stream>(stream), maps, arguments);
}

void probe_flags(const ProbeFlags& p, void* stream) {
  require(p.rounds >= 1 && p.rounds < int64_t{1} << 31, "rounds of ", p.rounds, " are not in 1 … 2^31 - 1");
  check_address("words", p.words, 4);
  launch(sm90::probe_flags_kernel, LaunchConfig{2, 32}, static_cast<Stream>(stream), p);
}

}  // namespace lorafuse

// The main loop of every sm_90 kernel: a ring of stages in shared memory, filled by TMA, multiplied by wgmma.
//
// A block has three warpgroups. One thread of the first (the producer) asks TMA for the boxes of one K-block after the
// other: rows of A into a(), columns of B into b(). The other two (the consumers) multiply: each owns 64 of the tile's
// 128 rows and all of its columns, or all 64 rows and half of the columns, in fp32 accumulators. Two mbarriers a stage
// keep them apart:
//   full[s]:  the bytes of the stage have arrived     (TMA completes it; the consumers wait)
//   empty[s]: every warp that reads the stage is done (8 warps of each block of the cluster arrive; the producer waits)
// and each side knows which phase it is in by one parity bit that flips when the ring wraps.
//
// Two blocks of a cluster walk neighbouring row blocks and the same columns: each loads half of the tile of B and
// multicasts it to both, which halves the reads of w from L2 (6336 → 4224 bytes a clock for 128x256 tiles on 132 SMs,
// where L2 gives about 6150; model, docs/hopper.md).
#pragma once

#include <lorafuse/layout.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/tma.cuh>
#include <lorafuse/ptx/wgmma.cuh>

namespace lorafuse::sm90 {

using ptx::Major;
using ptx::TensorMap;

constexpr int BLOCK_K = kBoxElements;
constexpr int kStepsOfBlock = BLOCK_K / kStepElements;
constexpr int kThreads = 384;
constexpr int kWarpgroupRows = 64;
// 128 · 40 + 256 · 232 of the SM's 65536 registers; the launch gives each thread 168.
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = 232;
// A box of 64 rows of 64 elements.
constexpr int kBoxBytes = 64 * kBoxRowBytes;
constexpr int kMaxSharedBytes = 232448;

// What a consumer warpgroup owns of a tile: the first of its 64 rows, the first of its kColumns columns.
template <int BLOCK_M, int BLOCK_N>
struct ConsumerPart {
  static_assert(BLOCK_M == 128 || BLOCK_M == 64);
  static constexpr int kColumns = BLOCK_M == 128 ? BLOCK_N : BLOCK_N / 2;
  int row, column;
  LF_DEVICE explicit ConsumerPart(int consumer)
      : row(BLOCK_M == 128 ? consumer * kWarpgroupRows : 0), column(BLOCK_M == 128 ? 0 : consumer * kColumns) {}
};

// Shared memory, in this order from a 1024-byte boundary: stages, the tile on its way out, barriers, a word.
template <int BLOCK_M, int BLOCK_N>
struct SharedPlan {
  static constexpr int kTileABytes = BLOCK_M * kBoxRowBytes;
  static constexpr int kStageBytes = kTileABytes + BLOCK_N * kBoxRowBytes;
  static constexpr int kOutputBytes = BLOCK_M * BLOCK_N * 2;
  // dynamic shared memory is aligned to 16 bytes only
  LF_HOST_DEVICE static constexpr int bytes(int stages) { return 1024 + stages * (kStageBytes + 16) + kOutputBytes + 16; }
};

template <int BLOCK_M, int BLOCK_N>
struct Pipeline {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  uint8_t* base;
  int stages, cluster;
  int stage = 0;
  uint32_t parity = 0;

  LF_DEVICE Pipeline(uint8_t* shared, int stages, int cluster)
      : base(shared + (-ptx::shared_address(shared) % 1024)), stages(stages), cluster(cluster) {}

  LF_DEVICE uint8_t* a() const { return base + stage * Plan::kStageBytes; }
  LF_DEVICE uint8_t* b() const { return a() + Plan::kTileABytes; }
  // The part of the output tile that consumer warpgroup `consumer` writes: one box for each 64 columns.
  LF_DEVICE uint8_t* output(int consumer) const {
    return base + stages * Plan::kStageBytes + consumer * (Plan::kOutputBytes / 2);
  }
  LF_DEVICE uint64_t* full() const {
    return reinterpret_cast<uint64_t*>(base + stages * Plan::kStageBytes + Plan::kOutputBytes) + stage;
  }
  LF_DEVICE uint64_t* empty() const { return full() + stages; }
  // A word for a number that one thread draws for others.
  LF_DEVICE uint32_t* mailbox() const { return reinterpret_cast<uint32_t*>(empty() + stages - stage); }

  // One thread, in start_block. `writers` threads arrive at a stage before it is full: the one that announces TMA's
  // bytes, and any that copy.
  LF_DEVICE void initialize(int writers = 1) {
    for (int s = 0; s < stages; ++s) {
      ptx::mbarrier_init(full() + s, writers);
      ptx::mbarrier_init(empty() + s, 8 * cluster);
    }
  }

  LF_DEVICE void advance() {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }

  // Producer: waits until the stage is free and announces the bytes that will come.
  LF_DEVICE void acquire(uint32_t bytes) {
    ptx::mbarrier_wait_cluster(empty(), parity ^ 1);
    ptx::mbarrier_arrive_expect(full(), bytes);
  }

  // Consumer: a warp is done with the stage before this one, in both blocks of a cluster, whose TMA writes it.
  LF_DEVICE void release_previous(int lane) {
    const int previous = (stage == 0 ? stages : stage) - 1;
    if (lane < cluster) ptx::mbarrier_arrive_cluster(empty() - stage + previous, lane);
  }
};

// How every kernel starts: one thread sets up the block's mbarriers and prefetches two tensor maps, and then those of
// all blocks of the cluster are there. Returns the warp, which is the same in all lanes; the shuffle tells the compiler.
template <class SetUp>
LF_DEVICE int start_block(const TensorMap& first, const TensorMap& second, SetUp set_up) {
  if (threadIdx.x == 0) {
    set_up();
    ptx::mbarrier_init_fence();
    ptx::tma_prefetch(&first);
    ptx::tma_prefetch(&second);
  }
  ptx::warp_sync();
  ptx::cluster_sync();
  return ptx::shuffle(static_cast<int>(threadIdx.x) / 32, 0);
}
// And how those of clusters end.
LF_DEVICE void end_block() {
  // the other block may still arrive at this one's barriers
  ptx::warp_sync();
  ptx::cluster_sync();
}

// The descriptor of an operand with 64 reduction elements, and what its next 16 add to it.
template <Major kMajor>
LF_DEVICE uint64_t descriptor(const uint8_t* operand) {
  const uint32_t address = ptx::shared_address(operand);
  return kMajor == Major::K ? k_major_descriptor(address) : mn_major_descriptor(address, BLOCK_K);
}
template <Major kMajor>
constexpr uint64_t kStep = kMajor == Major::K ? kStepKMajor : kStepMNMajor;

// Adds kSteps steps of 16 reduction elements: d[64, N] (+)= a[64, 16 kSteps] b[16 kSteps, N].
template <class T, int N, Major kMajorB, int kSteps, Major kMajorA = Major::K>
LF_DEVICE void multiply(float (&d)[N / 2], const uint8_t* a, const uint8_t* b, bool accumulate) {
  const uint64_t descriptor_a = descriptor<kMajorA>(a), descriptor_b = descriptor<kMajorB>(b);
  LF_UNROLL
  for (int step = 0; step < kSteps; ++step) {
    ptx::wgmma<T, N, kMajorB, kMajorA>(d, descriptor_a + step * kStep<kMajorA>, descriptor_b + step * kStep<kMajorB>,
                                       step > 0 || accumulate);
  }
}

// Consumer: waits for the stage, whose products may be issued then.
template <int BLOCK_M, int BLOCK_N>
LF_DEVICE void begin_stage(Pipeline<BLOCK_M, BLOCK_N>& pipeline) {
  ptx::mbarrier_wait(pipeline.full(), pipeline.parity);
  ptx::wgmma_fence();
}
// The products of the stage stay in flight; those of the stage before, where some still are (`in_flight`), are complete
// then and their stage is released.
template <int BLOCK_M, int BLOCK_N>
LF_DEVICE void end_stage(Pipeline<BLOCK_M, BLOCK_N>& pipeline, int lane, bool in_flight) {
  ptx::wgmma_commit();
  ptx::wgmma_wait<1>();
  if (in_flight) pipeline.release_previous(lane);
  pipeline.advance();
}

// Consumer: one K-block for the accumulators of its `part` of a tile, N columns.
template <class T, int N, Major kMajorB, int kSteps, int BLOCK_M, int BLOCK_N>
LF_DEVICE void multiply_block(float (&d)[N / 2], Pipeline<BLOCK_M, BLOCK_N>& pipeline,
                              const ConsumerPart<BLOCK_M, BLOCK_N>& part, int lane, bool in_flight, bool accumulate) {
  begin_stage(pipeline);
  multiply<T, N, kMajorB, kSteps>(d, pipeline.a() + part.row * kBoxRowBytes, pipeline.b() + part.column * kBoxRowBytes,
                                  accumulate);
  end_stage(pipeline, lane, in_flight);
}

// Consumer: completes what the last stage left in flight.
template <int BLOCK_M, int BLOCK_N>
LF_DEVICE void finish_blocks(Pipeline<BLOCK_M, BLOCK_N>& pipeline, int lane) {
  ptx::wgmma_wait<0>();
  pipeline.release_previous(lane);
}

// Producer: the columns column … column + BLOCK_N of B and 64 reduction elements from `reduction` on, into b(). B as
// stored is [columns, reduction] (K-major: one box) or [reduction, columns] (MN-major: a box for each 64 columns).
template <Major kMajorB, int BLOCK_M, int BLOCK_N>
LF_DEVICE void load_b(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const TensorMap* map, int reduction, int column, int rank) {
  if (pipeline.cluster == 1) {
    if constexpr (kMajorB == Major::K) {
      ptx::tma_load(pipeline.b(), map, reduction, column, pipeline.full());
    } else {
      for (int n = 0; n < BLOCK_N; n += kBoxElements) {
        ptx::tma_load(pipeline.b() + n * kBoxRowBytes, map, column + n, reduction, pipeline.full());
      }
    }
    return;
  }
  // this block's half, to both
  constexpr uint16_t kBoth = 3;
  constexpr int kHalf = BLOCK_N / 2;
  if constexpr (kMajorB == Major::K) {
    ptx::tma_load_multicast(pipeline.b() + rank * kHalf * kBoxRowBytes, map, reduction, column + rank * kHalf,
                            pipeline.full(), kBoth);
  } else {
    for (int n = rank * kHalf; n < (rank + 1) * kHalf; n += kBoxElements) {
      ptx::tma_load_multicast(pipeline.b() + n * kBoxRowBytes, map, column + n, reduction, pipeline.full(), kBoth);
    }
  }
}

// The 128 threads of a consumer warpgroup.
LF_DEVICE void consumer_sync(int consumer) {
  if (consumer == 0) {
    ptx::named_barrier_sync<1, 128>();
  } else {
    ptx::named_barrier_sync<2, 128>();
  }
}

}  // namespace lorafuse::sm90

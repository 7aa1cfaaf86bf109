// gate = x w_0ᵀ + bias_0 + xa_0 b_0ᵀ, up the same of w_1, h = act(gate) · up; and dgate, dup, h of dh (sm_90a).
//
// Shapes as in api_gated.hpp. Tickets, ring and accumulators are those of linear_sm90.cuh; a tile of forward has BLOCK_N / 2
// columns of gate and the same of up. dh = dy w + mask ⊙ (dyb a).
//
//   forward    B of a K-block is half w_0, half w_1: one product computes both. xa and b of both layers are K-blocks of
//              one product too, [xa_0 | xa_1] [b_0 0; 0 b_1]ᵀ, whose zeros are what TMA reads outside of b_0 and of b_1.
//              With ha, the ring then holds the tile's columns of a_down, and h, which is in shared memory to be stored,
//              is multiplied by them: a partial sum for each column of tiles, which add_matrices adds up.
//   backward   after the K-blocks of dy and of dyb the ring holds gate and up of the tile, which come while it is still
//              multiplied; dh goes to shared memory alone. With dropout on h, the K-blocks of dyb come first, and their
//              product is masked in the accumulators, to which dy w is added.
//
// Fused: the activation and its backward (gated_epilogue_sm90.cuh), chosen when the kernel runs. Against the products
// and a pass over their results: forward reads gate and up once less, backward does not write dh and reads it, gate and
// up once less. FLOPs are those of the products. Bytes: a tile writes three tiles, and in backward reads two. With ha, 4 R
// bytes for each row of a tile are written and read once; a pass over h reads 256 for it in tiles of 256 columns.
#pragma once

#include <lorafuse/schedule.cuh>

#include "gated_epilogue_sm90.cuh"
#include "linear_sm90.cuh"

namespace lorafuse::sm90 {

enum class Pass { kForward, kBackward, kMaskedBackward };

// Of pairs, [0] is gate's and [1] up's; backward has one w and one b, which is a.
struct GatedMaps {
  TensorMap x, w[2], xa, b[2];
  TensorMap read[2];  // backward: gate and up
  TensorMap written[2], h;
  TensorMap a_down;
};

struct GatedArguments {
  TileOrder order;
  int stages, cluster;
  uint32_t* workspace;  // counts the tiles that were drawn
  int k_blocks, rank_blocks;
  int whole_blocks;  // of both, those of all four steps; of the ranks alone with a mask
  int last_steps;    // of the block that follows them: 1, 2, or 0 of none
  int first_rank[2];  // forward: columns of xa before those of the layer
  int N;
  const void* bias[2];
  Activation activation;
  bool keep_up;
  // forward, where ha is computed: partial sums [columns of tiles, M, down_ranks]
  int M, down_ranks;
  float* partials;
  // kMaskedBackward
  const int64_t* seed;
  uint32_t drop_below;
  // adapters were written by the launch before, which this one may overlap
  bool overlap_previous;
};

// Producer: half of b() from each of two K-major operands, columns column … of both; a block of a cluster loads one.
template <int BLOCK_M, int BLOCK_N>
LF_DEVICE void load_halves(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const TensorMap (&maps)[2], int reduction0,
                           int reduction1, int column, int rank) {
  constexpr uint16_t kBoth = 3;
  LF_UNROLL
  for (int half = 0; half < 2; ++half) {
    uint8_t* place = pipeline.b() + half * (BLOCK_N / 2 * kBoxRowBytes);
    const int reduction = half == 0 ? reduction0 : reduction1;
    if (pipeline.cluster == 1) {
      ptx::tma_load(place, &maps[half], reduction, column, pipeline.full());
    } else if (half == rank) {
      ptx::tma_load_multicast(place, &maps[half], reduction, column, pipeline.full(), kBoth);
    }
  }
}

// Adds both biases; `column` is the first of each, and columns from N on do not exist.
template <class T, int N_TILE>
LF_DEVICE void add_biases(float (&d)[N_TILE / 2], const void* const (&biases)[2], int column, int N, int thread) {
  LF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const T* bias = static_cast<const T*>(biases[half]);
    if (bias == nullptr) continue;
    LF_UNROLL
    for (int i = half * (N_TILE / 4); i < (half + 1) * (N_TILE / 4); i += 4) {
      const int n = column + fragment_column(thread, i) - half * (N_TILE / 2);
      if (n < N) {
        const uint32_t pair = ptx::load_global(reinterpret_cast<const uint32_t*>(bias + n));
        const float low = ptx::unpack<T>(pair), high = ptx::unpack<T>(pair >> 16);
        d[i] += low;
        d[i + 1] += high;
        d[i + 2] += low;
        d[i + 3] += high;
      }
    }
  }
}

struct alignas(8) FloatPair {
  float low, high;
};

// What the 64 kBoxes columns of h in `boxes` add to ha = h a_downᵀ of the warpgroup's rows, into `sums` [M, ranks], ranks a
// multiple of 16. The ring's next stage holds the same columns of a_down, a box of `ranks` rows for each 64.
template <class T, int kBoxes, int BLOCK_M, int BLOCK_N>
LF_DEVICE void multiply_down(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const uint8_t* boxes, float* sums, int ranks, int row,
                             int M, int thread) {
  constexpr int kRanks = 16;
  // one thread of it has stored h
  ptx::warp_sync();
  ptx::mbarrier_wait(pipeline.full(), pipeline.parity);
  LF_NO_UNROLL
  for (int rank = 0; rank < ranks; rank += kRanks) {
    float d[kRanks / 2];
    ptx::wgmma_fence();
    LF_UNROLL
    for (int box = 0; box < kBoxes; ++box) {
      const uint8_t* a = pipeline.b() + (box * ranks + rank) * kBoxRowBytes;
      multiply<T, kRanks, Major::K, kStepsOfBlock>(d, boxes + box * kBoxBytes, a, box > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    LF_UNROLL
    for (int i = 0; i < kRanks / 2; i += 2) {
      const int m = row + fragment_row(thread, i);
      float* place = sums + static_cast<int64_t>(m) * ranks + rank + fragment_column(thread, i);
      if (m < M) ptx::store_global(reinterpret_cast<FloatPair*>(place), FloatPair{d[i], d[i + 1]});
    }
  }
  pipeline.advance();
  pipeline.release_previous(thread % 32);
}

template <class T, int BLOCK_N, Pass kPass>
LF_KERNEL(kThreads)
gated_kernel(LF_GRID_CONSTANT GatedMaps maps, LF_GRID_CONSTANT GatedArguments p) {
  constexpr bool kForward = kPass == Pass::kForward, kMasked = kPass == Pass::kMaskedBackward;
  constexpr Major kMajorB = kForward ? Major::K : Major::MN;
  // columns of a tile, of each matrix
  constexpr int kColumns = kForward ? BLOCK_N / 2 : BLOCK_N;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, p.cluster);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages), p.cluster);
  const int rank = p.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const int warp = start_block(maps.x, maps.w[0], [&] {
    pipeline.initialize();
    tickets.initialize();
  });

  const int tiles = p.order.tiles(), programs = static_cast<int>(gridDim.x) / p.cluster;
  const auto first_row = [&](const Tile& tile) { return (tile.row * p.cluster + rank) * BLOCK_M; };

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      bool overlaps = p.overlap_previous;
      const auto draw = [&] { return rank == 0 ? static_cast<int>(ptx::fetch_add_relaxed(p.workspace, 1)) : 0; };
      int next = draw();
      for (int index = tickets.pass(next, rank); index < tiles; index = tickets.pass(next, rank)) {
        const Tile tile = p.order.at(index);
        const int row = first_row(tile), column = tile.column * kColumns;
        const auto load_blocks = [&](const TensorMap& a, const TensorMap (&b)[2], int blocks, int first0, int first1) {
          LF_NO_UNROLL
          for (int block = 0; block < blocks; ++block) {
            const int k = block * BLOCK_K;
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), &a, k, row, pipeline.full());
            if constexpr (kForward) {
              load_halves(pipeline, b, k - first0, k - first1, column, rank);
            } else {
              load_b<kMajorB>(pipeline, &b[0], k, column, rank);
            }
            pipeline.advance();
          }
        };
        const auto load_ranks = [&] {
          if (overlaps) {
            ptx::wait_for_previous_launch();
            ptx::fence_proxy_async();
          }
          overlaps = false;
          load_blocks(maps.xa, maps.b, p.rank_blocks, p.first_rank[0], p.first_rank[1]);
        };
        if constexpr (kMasked) load_ranks();
        load_blocks(maps.x, maps.w, p.k_blocks, 0, 0);
        // comes while the ring is still full
        next = draw();
        if constexpr (!kMasked) load_ranks();
        if constexpr (kForward) {
          if (p.down_ranks > 0) {
            // every block its own: a cluster has loaded what it shares
            const int box_bytes = p.down_ranks * kBoxRowBytes;
            pipeline.acquire(kColumns / kBoxElements * box_bytes);
            LF_UNROLL
            for (int box = 0; box < kColumns / kBoxElements; ++box) {
              ptx::tma_load(pipeline.b() + box * box_bytes, &maps.a_down, column + box * kBoxElements, 0,
                            pipeline.full());
            }
            pipeline.advance();
          }
        } else {
          LF_NO_UNROLL
          for (int n = 0; n < BLOCK_N; n += kBoxElements) {
            static_assert(2 * Plan::kTileABytes <= Plan::kStageBytes);
            pipeline.acquire(2 * Plan::kTileABytes);
            ptx::tma_load(pipeline.a(), &maps.read[0], column + n, row, pipeline.full());
            ptx::tma_load(pipeline.b(), &maps.read[1], column + n, row, pipeline.full());
            pipeline.advance();
          }
        }
      }
      if (rank == 0 && is_last_number(next, tiles, programs)) ptx::store_relaxed(p.workspace, 0);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    for (int index = tickets.take(lane); index < tiles; index = tickets.take(lane)) {
      const Tile tile = p.order.at(index);
      const int row = first_row(tile) + part.row, column = tile.column * kColumns;
      float d[BLOCK_N / 2];
      LF_NO_UNROLL
      for (int block = 0; block < p.whole_blocks; ++block) {
        multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, block > 0);
      }
      const bool more = !kMasked || p.whole_blocks > 0;
      if (p.last_steps == 1) multiply_block<T, BLOCK_N, kMajorB, 1>(d, pipeline, part, lane, more, more);
      if (p.last_steps == 2) multiply_block<T, BLOCK_N, kMajorB, 2>(d, pipeline, part, lane, more, more);
      if constexpr (kMasked) {
        finish_blocks(pipeline, lane);
        drop<BLOCK_N>(d, p.seed, p.drop_below, row, column, p.N, thread);
        LF_NO_UNROLL
        for (int block = 0; block < p.k_blocks; ++block) {
          multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, true);
        }
      }
      finish_blocks(pipeline, lane);

      if constexpr (kForward) {
        add_biases<T, BLOCK_N>(d, p.bias, column, p.N, thread);
        store_activated<T, BLOCK_N>(d, &maps.written[0], &maps.written[1], p.keep_up, &maps.h, p.activation,
                                    pipeline.output(consumer), row, column, consumer, thread);
        if (p.down_ranks > 0) {
          constexpr int kBoxes = kColumns / kBoxElements;
          float* sums = p.partials + static_cast<int64_t>(tile.column) * p.M * p.down_ranks;
          multiply_down<T, kBoxes>(pipeline, pipeline.output(consumer) + kBoxes * kBoxBytes, sums, p.down_ranks, row, p.M,
                                   thread);
        }
      } else {
        const auto store = [&](int n, const uint8_t* gates, const uint8_t* ups, const uint8_t* hs) {
          if (thread == 0) {
            store_boxes(&maps.written[0], gates, 1, row, column + n);
            store_boxes(&maps.written[1], ups, 1, row, column + n);
            store_boxes(&maps.h, hs, 1, row, column + n);
          }
        };
        DenseRows rows;
        store_gradients<T>(d, pipeline, p.activation, rows, store, consumer, thread);
      }
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
  end_block();
}

}  // namespace lorafuse::sm90

// Layers of one x: y_i = x w_iᵀ + bias_i + xa_i b_iᵀ, or dx = Σ_i dy_i w_i + dyb a, in one persistent kernel (sm_90a).
//
// Shapes as in api_siblings.hpp. Every w lies where it is: a table holds the tensor maps of all operands, and each tile
// looks up which it reads and where it goes. A tile is the sum of base products, one after the other in the same ring and
// the same accumulators, and of a low-rank product:
//
//   forward   an output for each layer, of one base product; the tiles of all outputs are one order (SideBySide)
//   dx        one output, of a base product for each layer: the reduction goes on from w_i to w_{i+1}; one low-rank
//             product of all ranks. dx is written once and never read, where autograd adds a full-size gradient a layer.
//   dx, kMasked  the low-rank products of layers with dropout come first, each with its mask: 64 columns of one at a
//             time in accumulators of their own, masked there and added to those of the tile.
//
// Clusters draw their tiles by ticket, for the reason that linear_sm90.cuh gives, and share no flag, so that results depend
// on no order. Adapters are rounded by a launch before the product (round_each), which the first tiles' base products
// overlap.
//
// FLOPs and bytes are those of linear_sm90.cuh for each layer, less reads of x, last waves and passes over dx. The last
// K-block of the ranks issues one step of 16 where that holds them, else all four, of which TMA's zeros are a part.
#pragma once

#include <lorafuse/side_by_side.cuh>

#include "linear_sm90.cuh"

namespace lorafuse::sm90 {

// The operands of one product: rows [M, reduction], and B as its direction stores it.
struct ProductMaps {
  TensorMap a, b;
};
struct SiblingsMaps {
  ProductMaps base[kMostSiblings], low[kMostSiblings], masked[kMostSiblings];
  TensorMap y[kMostSiblings];
};

struct SiblingsArguments {
  SideBySide tiles;
  int terms;  // of each output: output i is the sum of the base products from i on
  int stages, cluster;
  uint32_t* workspace;  // counts the tiles that were drawn
  int k_blocks[kMostSiblings];     // of a base product
  int rank_blocks[kMostSiblings];  // of an output's low-rank product
  int whole_blocks[kMostSiblings];  // of an output, all of four steps; one of a single step follows where
  bool ends_short[kMostSiblings];
  int N[kMostSiblings];
  const void* bias[kMostSiblings];
  // kMasked: low-rank products with masks
  int masks;
  int mask_blocks[kMostSiblings];
  const int64_t* seeds[kMostSiblings];
  uint32_t drop_below[kMostSiblings];
  // adapters were written by the launch before, which this one may overlap
  bool overlap_previous;
};

// Adds the masked low-rank products to the tile's accumulators.
template <class T, int BLOCK_N>
LF_DEVICE void add_masked(float (&d)[BLOCK_N / 2], Pipeline<BLOCK_M, BLOCK_N>& pipeline, const SiblingsArguments& p,
                          const ConsumerPart<BLOCK_M, BLOCK_N>& part, int row, int column, int thread) {
  const int lane = thread % 32;
  LF_NO_UNROLL
  for (int mask = 0; mask < p.masks; ++mask) {
    LF_UNROLL
    for (int n = 0; n < BLOCK_N; n += kBoxElements) {
      float low[kBoxElements / 2];
      LF_NO_UNROLL
      for (int block = 0; block < p.mask_blocks[mask]; ++block) {
        multiply_block<T, kBoxElements, Major::MN, kStepsOfBlock>(low, pipeline, part, lane, block > 0, block > 0);
      }
      finish_blocks(pipeline, lane);
      drop<kBoxElements>(low, p.seeds[mask], p.drop_below[mask], row, column + n, p.N[0], thread);
      LF_UNROLL
      for (int i = 0; i < kBoxElements / 2; ++i) d[n / 2 + i] += low[i];
    }
  }
}

template <class T, int BLOCK_N, Major kMajorB, bool kMasked>
LF_KERNEL(kThreads)
siblings_kernel(LF_GRID_CONSTANT SiblingsMaps maps, LF_GRID_CONSTANT SiblingsArguments p) {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, p.cluster);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages), p.cluster);
  const int rank = p.cluster == 1 ? 0 : static_cast<int>(ptx::cluster_rank());
  const int warp = start_block(maps.base[0].a, maps.base[0].b, [&] {
    pipeline.initialize();
    tickets.initialize();
  });

  const int tiles = p.tiles.order.tiles(), programs = static_cast<int>(gridDim.x) / p.cluster;
  const auto first_row = [&](const OutputTile& tile) { return (tile.row * p.cluster + rank) * BLOCK_M; };

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp == 0 && ptx::elect_one()) {
      bool overlaps = p.overlap_previous;
      const auto draw = [&] { return rank == 0 ? static_cast<int>(ptx::fetch_add_relaxed(p.workspace, 1)) : 0; };
      int next = draw();
      for (int index = tickets.pass(next, rank); index < tiles; index = tickets.pass(next, rank)) {
        const OutputTile tile = p.tiles.at(index);
        const int row = first_row(tile), column = tile.column * BLOCK_N;
        const auto load_blocks = [&](const ProductMaps& product, int blocks) {
          LF_NO_UNROLL
          for (int block = 0; block < blocks; ++block) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), &product.a, block * BLOCK_K, row, pipeline.full());
            load_b<kMajorB>(pipeline, &product.b, block * BLOCK_K, column, rank);
            pipeline.advance();
          }
        };
        const auto wait_for_adapters = [&] {
          if (overlaps) {
            ptx::wait_for_previous_launch();
            ptx::fence_proxy_async();
          }
          overlaps = false;
        };
        if constexpr (kMasked) {
          // dyb is the first operand, and a
          wait_for_adapters();
          LF_NO_UNROLL
          for (int mask = 0; mask < p.masks; ++mask) {
            LF_NO_UNROLL
            for (int n = 0; n < BLOCK_N; n += kBoxElements) {
              LF_NO_UNROLL
              for (int block = 0; block < p.mask_blocks[mask]; ++block) {
                pipeline.acquire(Plan::kTileABytes + kBoxBytes);
                ptx::tma_load(pipeline.a(), &maps.masked[mask].a, block * BLOCK_K, row, pipeline.full());
                ptx::tma_load(pipeline.b(), &maps.masked[mask].b, column + n, block * BLOCK_K, pipeline.full());
                pipeline.advance();
              }
            }
          }
        }
        const int end = tile.output + p.terms;
        LF_NO_UNROLL
        for (int term = tile.output; term < end; ++term) load_blocks(maps.base[term], p.k_blocks[term]);
        // comes while the ring is still full
        next = draw();
        if constexpr (!kMasked) wait_for_adapters();
        load_blocks(maps.low[tile.output], p.rank_blocks[tile.output]);
      }
      if (rank == 0 && is_last_number(next, tiles, programs)) ptx::store_relaxed(p.workspace, 0);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128, lane = thread % 32;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    for (int index = tickets.take(lane); index < tiles; index = tickets.take(lane)) {
      const OutputTile tile = p.tiles.at(index);
      const int row = first_row(tile) + part.row, column = tile.column * BLOCK_N;
      const int blocks = p.whole_blocks[tile.output];
      float d[BLOCK_N / 2];
      if constexpr (kMasked) {
        LF_UNROLL
        for (int i = 0; i < BLOCK_N / 2; ++i) d[i] = 0.0f;
        add_masked<T, BLOCK_N>(d, pipeline, p, part, row, column, thread);
      }
      LF_NO_UNROLL
      for (int block = 0; block < blocks; ++block) {
        multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, kMasked || block > 0);
      }
      if (p.ends_short[tile.output]) multiply_block<T, BLOCK_N, kMajorB, 1>(d, pipeline, part, lane, true, true);
      finish_blocks(pipeline, lane);

      const T* bias = static_cast<const T*>(p.bias[tile.output]);
      if (bias != nullptr) add_bias<T, BLOCK_N>(d, bias, column, p.N[tile.output], thread);
      store_tile<T, BLOCK_N>(d, &maps.y[tile.output], pipeline.output(consumer), row, column, consumer, thread);
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
  end_block();
}

}  // namespace lorafuse::sm90

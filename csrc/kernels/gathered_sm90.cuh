// y[s] = x[order[s] / choices] w[g] + bias[g] + xa[s] b[g] for the rows s of each group g, ragged on the device (sm_90a).
//
// Shapes as in api_gathered.hpp; what a tile is, FLOPs and bytes as in grouped_sm90.cuh. Three things are new.
//
// Gathered rows. TMA reads boxes of neighbouring rows, so that here the producer's 128 threads copy A: each copies 16
// bytes of every 16th row of a K-block to where TMA's swizzle would put them, eight threads a line of 128 bytes. TMA
// still loads B. The full barrier of a stage counts both: TMA's bytes, announced by one thread, and one arrival of each
// thread, which happens when its copies have landed. Copies are ordinary writes and wgmma reads by the async proxy: each
// consumer has a fence between its wait and its products, while the products of the stage before run. Rows behind the
// end of a group are zeros, and are not read. Where rows are in order (`order` null), TMA loads A too.
//
// Tickets. A block draws its next tile when the last loads of the one before are under way, so that blocks that start
// late, or share their SM's time, leave tiles to the others. Which tile a ticket is depends on the offsets, which the
// device alone knows: producer and consumers walk them, forward only. Who draws the last ticket resets the counter: each
// block draws one that is no tile, and has walked to the number of tiles by then. The sum of a tile is the same whoever
// computes it, so that results are bit for bit those of any other schedule.
//
// Gates. With `h`, w has the columns of gate and then as many of up. A tile has BLOCK_N / 2 columns of each, so that a
// K-block of B is two boxes of one stack, and h = act(gate) · up is computed where the tile is stored
// (gated_epilogue_sm90.cuh), of the numbers that u = y holds: neither is read again for it.
//
// With `u` too the product is dh, that of the layer behind the activation. After its K-blocks the ring holds gate and up
// of the tile, BLOCK_N columns of each, which come while dh is still multiplied; the gradients of both for row_scale · dh
// leave from where these lay, and h from where dh was rounded. ⟨dh, h⟩ of a row over the tile's columns is the part that
// the tile has of the gradient of the row's router weight: 8 threads add it in a fixed order.
//
// Roles: pipeline_sm90.cuh; of four producer warps, all copy where rows are gathered. Host: gathered_launch_sm90.cuh.
#pragma once

#include <lorafuse/ptx/copies.cuh>

#include "gated_sm90.cuh"
#include "grouped_sm90.cuh"
#include "tickets_sm90.cuh"

namespace lorafuse::sm90 {

// 128 · 88 + 256 · 208 of the 64512 registers of the launch: threads that copy hold where their rows lie
constexpr int kCopierRegisters = 88;
constexpr int kGatheredConsumerRegisters = 208;
constexpr int kCopiers = 128;

// What a launch does of the activation between gate and up and the layer behind it.
enum class Gates { kNone, kForward, kBackward };

struct GatheredMaps {
  TensorMap x, w, xa, b, y;
  // with gates: y is gate's columns, or its gradient's
  TensorMap up, h;
  TensorMap read[2];  // backward: gate and up
};

struct GatheredArguments {
  int rows, groups, N, K, R;
  int k_blocks, rank_blocks;
  int whole_blocks;  // of a tile, all of four steps; one of a single step follows where
  bool ends_short;
  int stages;
  const int64_t* offsets;
  const int64_t* order;
  int choices;
  const void* x;
  int64_t stride_x;
  const void* xa;
  int64_t stride_xa;
  const void* bias;
  void* y;
  int64_t stride_y;
  uint32_t* tickets;
  Activation activation;
  void* h;
  int64_t stride_h;
  const float* row_scale;
  float* products;
};

// Rows of a tile that a copying thread has a part of: thread / 8, and every 16th further one.
template <int BLOCK_M>
constexpr int kRowsOfCopier = BLOCK_M * 8 / kCopiers;
LF_DEVICE int row_of_copier(int thread, int i) { return thread / 8 + i * (kCopiers / 8); }

// A copying thread: its part of the 64 columns from `column` on, of a matrix of `columns`, of which `row(i)` is the i-th
// row that it copies and -1 none.
template <int BLOCK_M, class T, class Row>
LF_DEVICE void copy_rows(uint8_t* a, const T* base, int64_t stride, int column, int columns, int thread, Row&& row) {
  const int piece = thread % 8 * 8, left = columns - column - piece;
  const int bytes = left <= 0 ? 0 : left < 8 ? left * 2 : 16;
  // rows a multiple of 8 apart are swizzled alike
  uint8_t* const place = a + box_offset(thread / 8, piece);
  LF_UNROLL
  for (int i = 0; i < kRowsOfCopier<BLOCK_M>; ++i) {
    const int r = row(i);
    const T* from = base + (r < 0 ? 0 : r) * stride + column + piece;
    ptx::copy_async(place + i * (kCopiers / 8) * kBoxRowBytes, from, r < 0 ? 0 : bytes);
  }
}

// Consumer: multiply_block of pipeline_sm90.cuh, whose A threads have copied where rows are gathered.
template <class T, int N, Major kMajorB, int kSteps, bool kGathered, int BLOCK_M, int BLOCK_N>
LF_DEVICE void multiply_gathered(float (&d)[N / 2], Pipeline<BLOCK_M, BLOCK_N>& pipeline,
                                 const ConsumerPart<BLOCK_M, BLOCK_N>& part, int lane, bool continues) {
  ptx::mbarrier_wait(pipeline.full(), pipeline.parity);
  if constexpr (kGathered) ptx::fence_proxy_async_shared();
  ptx::wgmma_fence();
  multiply<T, N, kMajorB, kSteps>(d, pipeline.a() + part.row * kBoxRowBytes, pipeline.b() + part.column * kBoxRowBytes,
                                  continues);
  end_stage(pipeline, lane, continues);
}

// Producer: load_group_b of grouped_sm90.cuh; of two halves of columns, where gate and up lie in one stack.
template <Major kMajorB, bool kHalves, int BLOCK_M, int BLOCK_N>
LF_DEVICE void load_columns(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const TensorMap* map, int reduction,
                            const RaggedTile& tile, int N) {
  if constexpr (!kHalves) {
    load_group_b<kMajorB>(pipeline, map, reduction, tile.column * BLOCK_N, tile.group);
  } else {
    constexpr int kHalf = BLOCK_N / 2, kWidth = kMajorB == Major::K ? kHalf : kBoxElements;
    LF_UNROLL
    for (int n = 0; n < BLOCK_N; n += kWidth) {
      const int column = tile.column * kHalf + n % kHalf + n / kHalf * N;
      uint8_t* place = pipeline.b() + n * kBoxRowBytes;
      if constexpr (kMajorB == Major::K) {
        ptx::tma_load(place, map, reduction, column, tile.group, pipeline.full());
      } else {
        ptx::tma_load(place, map, column, reduction, tile.group, pipeline.full());
      }
    }
  }
}

// Consumer: rows row … row_end of `count` boxes of 64 columns, by ordinary stores into `y` [rows, N].
template <class T>
LF_DEVICE void store_box_rows(const uint8_t* boxes, int count, T* y, int64_t stride, int row, int row_end, int column,
                              int N, int thread) {
  constexpr int kPieces = kBoxRowBytes / kPieceBytes, kOfBox = kWarpgroupRows * kPieces;
  LF_NO_UNROLL
  for (int i = thread; i < count * kOfBox; i += 128) {
    const int box = i / kOfBox, r = i % kOfBox / kPieces, c = i % kPieces * (kPieceBytes / 2);
    const int m = row + r, n = column + box * kBoxElements + c;
    if (m >= row_end || n >= N) continue;
    const Piece piece = ptx::load_shared<Piece>(boxes + box * kBoxBytes + box_offset(r, c));
    ptx::store_global(reinterpret_cast<Piece*>(y + m * stride + n), piece);
  }
}

// Consumer: store_activated of gated_epilogue_sm90.cuh, for rows behind which another group's begin.
template <class T, int N_TILE>
LF_DEVICE void store_activated_rows(const float (&d)[N_TILE / 2], const GatheredArguments& p, uint8_t* boxes, int row,
                                    int row_end, int column, int consumer, int thread) {
  constexpr int kBoxes = N_TILE / 2 / kBoxElements;
  uint8_t* const ups = boxes + kBoxes * kBoxBytes;
  T* const y = static_cast<T*>(p.y);
  // the boxes may still be read for the tile before
  if (thread == 0) ptx::tma_store_wait_read<0>();
  consumer_sync(consumer);
  write_boxes<T, N_TILE>(d, boxes, thread);
  // gate and up are there
  consumer_sync(consumer);
  store_box_rows(boxes, kBoxes, y, p.stride_y, row, row_end, column, p.N, thread);
  store_box_rows(ups, kBoxes, y + p.N, p.stride_y, row, row_end, column, p.N, thread);
  // and have been read, before h takes the place of up
  consumer_sync(consumer);
  activate_boxes<T>(p.activation, boxes, ups, kBoxes * kBoxBytes, thread);
  // h is there
  consumer_sync(consumer);
  store_box_rows(ups, kBoxes, static_cast<T*>(p.h), p.stride_h, row, row_end, column, p.N, thread);
}

// Rows of a warpgroup's part of a tile as store_gradients of gated_epilogue_sm90.cuh reads them.
struct ScaledRows {
  const float* scale;  // null: 1
  int row, row_end, thread;
  float product = 0.0f;  // of row `mine`

  LF_DEVICE float factor(int r) const {
    if (scale == nullptr) return 1.0f;
    return row + r < row_end ? ptx::load_global(scale + row + r) : 0.0f;
  }
  // The first four of eight neighbours keep the sums of the rows that they read, 16 apart.
  LF_DEVICE void add(int r, float part) {
    LF_UNROLL
    for (int mask = 1; mask < 8; mask *= 2) part += ptx::shuffle_xor(part, mask);
    if (thread % 8 == r / 16) product += part;
  }
  LF_DEVICE void store(float* products) const {
    const int mine = row + thread / 8 + thread % 8 * 16;
    if (thread % 8 < 4 && mine < row_end) ptx::store_global(products + mine, product);
  }
};

template <class T, int BLOCK_M, int BLOCK_N, bool kTransposed, bool kGathered, Gates kGates>
LF_KERNEL(kThreads)
gathered_kernel(LF_GRID_CONSTANT GatheredMaps maps, LF_GRID_CONSTANT GatheredArguments p) {
  constexpr Major kMajorB = kTransposed ? Major::MN : Major::K;
  constexpr int kColumns = ConsumerPart<BLOCK_M, BLOCK_N>::kColumns;
  constexpr bool kHalves = kGates == Gates::kForward;
  // columns of a tile, of gate and of up where there are both
  constexpr int kWidth = kHalves ? BLOCK_N / 2 : BLOCK_N;
  static_assert(kGates == Gates::kNone || (kGathered && kColumns == BLOCK_N), "a warpgroup has both of its rows");
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, 1);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages));
  const int lane = threadIdx.x % 32;
  const int warp = start_block(maps.w, maps.y, [&] {
    // the thread of TMA, and those that copy
    pipeline.initialize(kGathered ? 1 + kCopiers : 1);
    // the consumers, and the warps that copy
    tickets.initialize(kGathered ? 12 : 8);
  });

  const auto load_end = [&](int group) { return static_cast<int>(ptx::load_global(p.offsets + group)); };
  RaggedWalk walk(p.groups, ceil_div(p.N, kWidth), BLOCK_M);
  RaggedTile tile;
  const auto draw = [&] { return static_cast<int>(ptx::fetch_add_relaxed(p.tickets, 1)); };
  // behind the walk, which has reached the number of tiles
  const auto reset_behind = [&](int ticket) {
    if (is_last_number(ticket, walk.last, gridDim.x)) ptx::store_relaxed(p.tickets, 0);
  };

  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kGathered ? kCopierRegisters : kProducerRegisters>();
    if constexpr (kGathered) {
      const int thread = threadIdx.x;
      bool leads = false;
      if (warp == 0) leads = ptx::elect_one();
      // of the thread that draws, which takes its own tickets as the others do
      Tickets passed = tickets;
      if (leads) passed.pass(draw());
      int index = tickets.take(lane);
      LF_NO_UNROLL
      for (; walk.seek(index, load_end, tile); index = tickets.take(lane)) {
        const auto row_of = [&](int i) {
          const int row = tile.row + row_of_copier(thread, i);
          return row < tile.row_end ? row : -1;
        };
        int sources[kRowsOfCopier<BLOCK_M>];
        LF_UNROLL
        for (int i = 0; i < kRowsOfCopier<BLOCK_M>; ++i) {
          const int row = row_of(i);
          sources[i] = row < 0 ? -1 : static_cast<int>(ptx::load_global(p.order + row)) / p.choices;
        }
        // `load` by the thread of TMA, which announces `bytes`, and `copy` by all
        const auto load_blocks = [&](int blocks, int bytes, const auto& load, const auto& copy) {
          LF_NO_UNROLL
          for (int block = 0; block < blocks; ++block) {
            ptx::mbarrier_wait_cluster(pipeline.empty(), pipeline.parity ^ 1);
            if (leads) {
              ptx::mbarrier_arrive_expect(pipeline.full(), bytes);
              load(block * BLOCK_K);
            }
            copy(block * BLOCK_K);
            ptx::copy_async_arrive(pipeline.full());
            pipeline.advance();
          }
        };
        const auto columns_of = [&](const TensorMap* map) {
          return [&, map](int k) { load_columns<kMajorB, kHalves>(pipeline, map, k, tile, p.N); };
        };
        constexpr int kBytesOfB = Plan::kStageBytes - Plan::kTileABytes;
        load_blocks(p.k_blocks, kBytesOfB, columns_of(&maps.w), [&](int k) {
          const auto source = [&](int i) { return sources[i]; };
          copy_rows<BLOCK_M>(pipeline.a(), static_cast<const T*>(p.x), p.stride_x, k, p.K, thread, source);
        });
        load_blocks(p.rank_blocks, kBytesOfB, columns_of(&maps.b), [&](int k) {
          copy_rows<BLOCK_M>(pipeline.a(), static_cast<const T*>(p.xa), p.stride_xa, k, p.R, thread, row_of);
        });
        if constexpr (kGates == Gates::kBackward) {
          static_assert(2 * Plan::kTileABytes <= Plan::kStageBytes);
          const auto load_gates = [&](int n) {
            // over what threads have copied: ordinary writes, before those of the async proxy
            ptx::fence_proxy_async_shared();
            ptx::tma_load(pipeline.a(), &maps.read[0], tile.column * BLOCK_N + n, tile.row, pipeline.full());
            ptx::tma_load(pipeline.b(), &maps.read[1], tile.column * BLOCK_N + n, tile.row, pipeline.full());
          };
          load_blocks(BLOCK_N / kBoxElements, 2 * Plan::kTileABytes, load_gates, [](int) {});
        }
        if (leads) passed.pass(draw());
      }
      if (leads) reset_behind(index);
    } else if (warp == 0 && ptx::elect_one()) {
      int index = draw();
      LF_NO_UNROLL
      for (; walk.seek(index, load_end, tile); index = draw()) {
        tickets.pass(index);
        const auto load_blocks = [&](const TensorMap* map_a, const TensorMap* map_b, int blocks) {
          LF_NO_UNROLL
          for (int block = 0; block < blocks; ++block) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), map_a, block * BLOCK_K, tile.row, pipeline.full());
            load_columns<kMajorB, kHalves>(pipeline, map_b, block * BLOCK_K, tile, p.N);
            pipeline.advance();
          }
        };
        load_blocks(&maps.x, &maps.w, p.k_blocks);
        load_blocks(&maps.xa, &maps.b, p.rank_blocks);
      }
      tickets.pass(index);
      reset_behind(index);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kGathered ? kGatheredConsumerRegisters : kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    LF_NO_UNROLL
    for (int index = tickets.take(lane); walk.seek(index, load_end, tile); index = tickets.take(lane)) {
      const int row = tile.row + part.row, column = tile.column * kWidth + part.column;
      float d[kColumns / 2];
      LF_NO_UNROLL
      for (int block = 0; block < p.whole_blocks; ++block) {
        multiply_gathered<T, kColumns, kMajorB, kStepsOfBlock, kGathered>(d, pipeline, part, lane, block > 0);
      }
      if (p.ends_short) multiply_gathered<T, kColumns, kMajorB, 1, kGathered>(d, pipeline, part, lane, true);
      finish_blocks(pipeline, lane);

      if (p.bias != nullptr) {
        const T* bias = static_cast<const T*>(p.bias) + static_cast<int64_t>(tile.group) * p.N * (kHalves ? 2 : 1);
        if constexpr (kHalves) {
          const void* const biases[] = {bias, bias + p.N};
          add_biases<T, kColumns>(d, biases, column, p.N, thread);
        } else {
          add_bias<T, kColumns>(d, bias, column, p.N, thread);
        }
      }
      // TMA clips at the end of y, and knows of no other end
      const bool whole = row + kWarpgroupRows <= tile.row_end || tile.row_end == p.rows;
      uint8_t* const boxes = pipeline.output(consumer);
      if constexpr (kGates == Gates::kBackward) {
        const auto store = [&](int n, const uint8_t* gates, const uint8_t* ups, const uint8_t* hs) {
          if (!whole) {
            T* const y = static_cast<T*>(p.y);
            store_box_rows(gates, 1, y, p.stride_y, row, tile.row_end, column + n, p.N, thread);
            store_box_rows(ups, 1, y + p.N, p.stride_y, row, tile.row_end, column + n, p.N, thread);
            store_box_rows(hs, 1, static_cast<T*>(p.h), p.stride_h, row, tile.row_end, column + n, p.N, thread);
          } else if (thread == 0) {
            store_boxes(&maps.y, gates, 1, row, column + n);
            store_boxes(&maps.up, ups, 1, row, column + n);
            store_boxes(&maps.h, hs, 1, row, column + n);
          }
        };
        ScaledRows rows{p.row_scale, row, tile.row_end, thread};
        store_gradients<T>(d, pipeline, p.activation, rows, store, consumer, thread);
        if (p.products != nullptr) rows.store(p.products + static_cast<int64_t>(tile.column) * p.rows);
      } else if constexpr (kGates == Gates::kForward) {
        if (whole) {
          store_activated<T, kColumns>(d, &maps.y, &maps.up, true, &maps.h, p.activation, boxes, row, column, consumer,
                                       thread);
        } else {
          store_activated_rows<T, kColumns>(d, p, boxes, row, tile.row_end, column, consumer, thread);
        }
      } else if (whole) {
        store_tile<T, kColumns>(d, &maps.y, boxes, row, column, consumer, thread);
      } else {
        store_rows<T, kColumns>(d, static_cast<T*>(p.y), p.stride_y, row, tile.row_end, column, p.N, thread);
      }
    }
    if (thread == 0) ptx::tma_store_wait<0>();
  }
}

}  // namespace lorafuse::sm90

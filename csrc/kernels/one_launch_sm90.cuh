// A direction of a layer in one launch (sm_90a), its work by ticket: BLOCK_M is 128, R at most 64, no mask.
//
//   forward    y = x wᵀ + bias + xa (scale b)ᵀ, xa = x aᵀ
//   backward   dx = dy w + dyb a, dyb = scale dy b, da = dybᵀ x and db = scale dyᵀ xa; no bias
//
// In the layer's names: x and dx [M, K], w [N, K], a [R, K], b [N, R], y and dy [M, N], xa and dyb [M, R].
// BackwardOrder (schedule.cuh) numbers the work, and blocks draw numbers until none is left:
//
//   rows      xa or dyb of 128 rows, in the accumulators of an item of xa (xa_items_sm90.cuh), published by a flag
//   a tile    of y or dx: the main loop of linear_kernel; its last K-block, the low-rank product, waits for that flag
//   columns   backward: of da or db over a chunk of the rows (adapter_grads_sm90.cuh); da waits until all dyb of the chunk
//             is there. Of several chunks each writes partial sums, and the last to arrive adds them in the order of the
//             chunks. Forward has one chunk and no columns.
//
// SMs that have no tile in the last wave, or in the only one, compute the other work. Before the first rows, the adapters
// are rounded to T (a, scale b; backward: a, scale bᵀ) by the three warps of each block that load nothing, in slices that
// they draw.
//
// Whoever waits, waits for a lower number that was drawn, or a slice: no launch depends on how many of its blocks run at
// a time. When the producer, the three warps and both consumers of every block have left, the last one zeroes the
// workspace. Which block computes what changes no bit.
//
// A launch may start while the one before it ends: it sets up its barriers, then waits before it touches memory.
//
// FLOPs forward 2 M N K + 2 M R (N + K), backward 2 M N K + 4 M R (N + K). Bytes: those of the product, and x once more,
// or dy twice and x once, from L2 where it still holds them.
#pragma once

#include "round_sm80.cuh"
#include "xa_items_sm90.cuh"

namespace lorafuse::sm90 {

// Backward: `xa` of LinearArguments is dyb, `a` of LinearMaps scale · bᵀ, `b` the rounded a.
struct OneLaunchArguments : LinearArguments {
  BackwardOrder work;
  // what rows are multiplied by, a or scale · bᵀ, and what xa or dyb is; `out` null: it is rounded
  Round rounded[2];
  int slices[2];
  float* partials;  // [chunks, C R] of db, then of da
  int words;        // of the workspace
};

// Words of the workspace, zero before and after a launch: numbers drawn, slices drawn, the flags of rows as in
// linear_kernel, slices rounded, who has left; the warpgroups that have published rows of each chunk, and the chunks of
// each item that are summed.
constexpr int kWorkTickets = 0, kSliceTickets = 1;
LF_HOST_DEVICE constexpr int rounded_word(const BackwardOrder& work) { return kFlags + kWordsOfFlag * work.tiles.rows; }
LF_HOST_DEVICE constexpr int left_word(const BackwardOrder& work) { return rounded_word(work) + 1; }
LF_HOST_DEVICE constexpr int chunk_word(const BackwardOrder& work, int chunk) { return left_word(work) + 1 + chunk; }
LF_HOST_DEVICE constexpr int item_word(const BackwardOrder& work, int item) {
  return chunk_word(work, work.chunks()) + item;
}
LF_HOST_DEVICE constexpr int one_launch_words(const BackwardOrder& work) { return item_word(work, work.items); }
// The producer, three warps and two consumers.
constexpr uint32_t kLeaversOfBlock = 6;

// One thread of whoever touches the workspace no more.
LF_DEVICE void leave(const OneLaunchArguments& p) {
  const uint32_t before = ptx::fetch_add_acquire_release(p.workspace + left_word(p.work), 1);
  if (before + 1 != kLeaversOfBlock * gridDim.x) return;
  LF_NO_UNROLL
  for (int i = 0; i < p.words; ++i) ptx::store_relaxed(p.workspace + i, 0);
}

// A warp: rounds slices of the adapters, 32 times 8 elements each, and publishes them.
template <class T>
LF_DEVICE void round_slices(const OneLaunchArguments& p, int lane) {
  const auto draw = [&] {
    const uint32_t ticket = lane == 0 ? ptx::fetch_add_relaxed(p.workspace + kSliceTickets, 1) : 0;
    return static_cast<int>(ptx::shuffle(ticket, 0));
  };
  LF_NO_UNROLL
  for (int slice = draw(); slice < p.slices[0] + p.slices[1]; slice = draw()) {
    const int of = slice < p.slices[0] ? 0 : 1;
    skinny::round_chunk<T>(p.rounded[of], int64_t{slice - of * p.slices[0]} * 32 + lane);
    ptx::warp_sync();
    if (lane == 0) ptx::add_release(p.workspace + rounded_word(p.work), 1);
  }
}

// Producer: until what others write is there, for TMA to read.
LF_DEVICE void wait_for(const OneLaunchArguments& p, int word, int value) {
  ptx::wait_at_least(p.workspace + word, static_cast<uint32_t>(value));
  ptx::fence_proxy_async();
}

// An item of columns: which sum, and its first column.
struct SumItem {
  int sum, column;
};
template <int BLOCK_N>
LF_DEVICE SumItem sum_item_of(const OneLaunchArguments& p, int item) {
  const int sum = item < p.sums[0].column_blocks ? 0 : 1;
  return {sum, (item - sum * p.sums[0].column_blocks) * BLOCK_N};
}
// The end of a chunk's rows.
LF_DEVICE int end_of(const OneLaunchArguments& p, int chunk) {
  const int end = (chunk * p.work.chunk + p.work.height(chunk)) * BLOCK_M;
  return end < p.M ? end : p.M;
}

// Consumer 0, behind a barrier after which its item of this chunk is written. Where it is the last of all chunks, adds
// them and stores the sum; `mailbox` is a word of shared memory.
template <class T, int BLOCK_N>
LF_DEVICE void finish_sum(const OneLaunchArguments& p, const Sum& sum, const float* partials, int item, int column,
                          uint32_t* mailbox, int thread) {
  struct alignas(16) Quad {
    float values[4];
  };
  // loads under way of a thread
  constexpr int kQuads = 4;
  const int chunks = p.work.chunks();
  if (thread == 0) {
    ptx::store_shared(mailbox, ptx::fetch_add_acquire_release(p.workspace + item_word(p.work, item), 1));
  }
  consumer_sync(0);
  if (ptx::load_shared<uint32_t>(mailbox) + 1 != static_cast<uint32_t>(chunks)) return;
  const int64_t size = static_cast<int64_t>(sum.C) * p.R;
  // transposed, rows of BLOCK_N columns; else all ranks of a column follow each other
  const auto place = [&](int element) {
    const int c = column + element % BLOCK_N;
    if (sum.transposed) return c < sum.C ? sum.place(c, element / BLOCK_N, p.R) : size;
    return static_cast<int64_t>(column) * p.R + element;
  };
  LF_NO_UNROLL
  for (int first = thread * 4; first < BLOCK_N * p.R; first += kQuads * 128 * 4) {
    Quad total[kQuads];
    for (int chunk = 0; chunk < chunks; ++chunk) {
      LF_UNROLL
      for (int i = 0; i < kQuads; ++i) {
        const int element = first + i * 128 * 4;
        const int64_t at = element < BLOCK_N * p.R ? place(element) : size;
        if (at >= size) continue;
        const Quad part = ptx::load_global(reinterpret_cast<const Quad*>(partials + chunk * size + at));
        LF_UNROLL
        for (int j = 0; j < 4; ++j) total[i].values[j] = part.values[j] + (chunk > 0 ? total[i].values[j] : 0.0f);
      }
    }
    LF_UNROLL
    for (int i = 0; i < kQuads; ++i) {
      const int element = first + i * 128 * 4;
      const int64_t at = element < BLOCK_N * p.R ? place(element) : size;
      LF_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (at < size) store_sum<T>(sum, at + j, total[i].values[j]);
      }
    }
  }
}

template <class T, int BLOCK_N, int kRankSteps, Major kMajorB>
LF_KERNEL(kThreads)
one_launch_kernel(LF_GRID_CONSTANT LinearMaps maps, LF_GRID_CONSTANT OneLaunchArguments p) {
  constexpr bool kBackward = kMajorB == Major::MN;
  using Item = XaItem<BLOCK_N, kRankSteps>;
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;

  LF_DYNAMIC_SHARED(shared);
  Pipeline<BLOCK_M, BLOCK_N> pipeline(shared, p.stages, 1);
  Tickets tickets(pipeline.base + TicketPlan<BLOCK_M, BLOCK_N>::tickets(p.stages));
  const int warp = start_block(maps.x, maps.w, [&] {
    pipeline.initialize();
    tickets.initialize();
  });
  const int lane = threadIdx.x % 32;
  ptx::wait_for_previous_launch();

  const int count = p.work.count();
  if (warp < 4) {
    // ---- producer
    ptx::registers_decrease<kProducerRegisters>();
    if (warp > 0) {
      round_slices<T>(p, lane);
      if (lane == 0) leave(p);
    } else if (ptx::elect_one()) {
      // TMA reads what the launch before has written
      ptx::fence_proxy_async();
      const auto draw = [&] { return static_cast<int>(ptx::fetch_add_relaxed(p.workspace + kWorkTickets, 1)); };
      bool rounded = false;
      const auto wait_for_adapters = [&] {
        if (!rounded) wait_for(p, rounded_word(p.work), p.slices[0] + p.slices[1]);
        rounded = true;
      };
      int next = draw();
      LF_NO_UNROLL
      for (int index = tickets.pass(next); index < count; index = tickets.pass(next)) {
        const Work work = p.work.at(index);
        if (work.kind == Work::kRows) {
          wait_for_adapters();
          load_xa_item<Item>(pipeline, maps, p.k_blocks, work.row);
          next = draw();
        } else if (kBackward && work.kind == Work::kColumns) {
          const SumItem item = sum_item_of<BLOCK_N>(p, work.column);
          if (item.sum == 1) {
            wait_for(p, chunk_word(p.work, work.row), static_cast<int>(kPublishers) * p.work.height(work.row));
          }
          load_item(pipeline, maps.sums[item.sum], work.row * p.work.chunk * BLOCK_M, end_of(p, work.row), item.column);
          next = draw();
        } else {
          const int row = work.row * BLOCK_M, column = work.column * BLOCK_N;
          const auto load_block = [&](const TensorMap* map_a, const TensorMap* map_b, int k) {
            pipeline.acquire(Plan::kStageBytes);
            ptx::tma_load(pipeline.a(), map_a, k, row, pipeline.full());
            load_b<kMajorB>(pipeline, map_b, k, column, 0);
            pipeline.advance();
          };
          LF_NO_UNROLL
          for (int block = 0; block < p.k_blocks; ++block) load_block(&maps.x, &maps.w, block * BLOCK_K);
          next = draw();
          wait_for_adapters();
          wait_for(p, kFlags + kWordsOfFlag * work.row, kPublishers);
          load_block(&maps.xa, &maps.b, 0);
        }
      }
      ptx::let_next_launch_start();
      leave(p);
    }
  } else {
    // ---- consumers
    ptx::registers_increase<kConsumerRegisters>();
    const int consumer = warp / 4 - 1, thread = threadIdx.x % 128;
    const ConsumerPart<BLOCK_M, BLOCK_N> part(consumer);
    // of tiles and of columns: two arrays would both be live from one turn to the next
    float d[BLOCK_N / 2];
    LF_NO_UNROLL
    for (int index = tickets.take(lane); index < count; index = tickets.take(lane)) {
      const Work work = p.work.at(index);
      if (work.kind == Work::kRows) {
        xa_item<T, Item>(pipeline, p, work.row, part.row, consumer, thread);
        if (kBackward && thread == 0) ptx::add_release(p.workspace + chunk_word(p.work, work.row / p.work.chunk), 1);
      } else if (kBackward && work.kind == Work::kColumns) {
        const auto [which, column] = sum_item_of<BLOCK_N>(p, work.column);
        const Sum sum = which == 0 ? p.sums[0] : p.sums[1];
        const int chunks = p.work.chunks(), first = work.row * p.work.chunk * BLOCK_M;
        float* const partials = p.partials + (which == 1 ? static_cast<int64_t>(chunks) * p.sums[0].C * p.R : 0);
        // of several chunks the sum itself, as it is
        Sum part_of_sum = sum;
        if (chunks > 1) {
          part_of_sum.out = partials + static_cast<int64_t>(work.row) * sum.C * p.R;
          part_of_sum.fp32 = true;
          part_of_sum.scale = 1.0f;
        }
        const auto store = [&](int64_t place, float value) { store_sum<T>(part_of_sum, place, value); };
        sum_item<T>(d, pipeline, sum, first, end_of(p, work.row), p.R, column, consumer, thread, store);
        // what consumer 1 has summed was read, where its next tile goes out; and partial sums are written
        consumers_sync();
        if (chunks > 1 && consumer == 0) {
          finish_sum<T, BLOCK_N>(p, sum, partials, work.column, column, pipeline.mailbox(), thread);
        }
      } else {
        const int row = work.row * BLOCK_M + part.row, column = work.column * BLOCK_N;
        LF_NO_UNROLL
        for (int block = 0; block < p.k_blocks; ++block) {
          multiply_block<T, BLOCK_N, kMajorB, kStepsOfBlock>(d, pipeline, part, lane, block > 0, block > 0);
        }
        multiply_block<T, BLOCK_N, kMajorB, kRankSteps>(d, pipeline, part, lane, true, true);
        finish_blocks(pipeline, lane);
        if (!kBackward && p.bias != nullptr) {
          add_bias<T, BLOCK_N>(d, static_cast<const T*>(p.bias), column, p.N, thread);
        }
        store_tile<T, BLOCK_N>(d, &maps.y, pipeline.output(consumer), row, column, consumer, thread);
      }
    }
    if (thread == 0) {
      leave(p);
      ptx::tma_store_wait<0>();
    }
  }
}

}  // namespace lorafuse::sm90

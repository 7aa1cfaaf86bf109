// db = scale · dyᵀ xa and da = dybᵀ x, by blocks of dx's launch that have no tile (Form::kDxAdapterGrads).
//
// Eight waves of 1024 tiles leave four of 132 multiprocessors without work, few rows leave most of them: these sum
// instead. In the words of reduce_sm80.cuh: columns[c, r] = Σ_m left[m, c] right[m, r], left = dy or x [M, C], right =
// xa or dyb [M, R], R at most 64; no bias, no mask.
//
// An item is BLOCK_N columns and all rows: its sums stay in registers from the first row to the last, so that there are
// no partial sums in memory, and their order is fixed (one_launch_sm90.cuh has items of fewer rows). Every 64 rows are a
// stage of the ring: boxes of 64 columns of left in b(), one box of 64 ranks of right, zeros from R on, in a(). Both
// have their reduction index, the rows, in the rows of their boxes: MN-major. The product is d[64 ranks, BLOCK_N] =
// rightᵀ left; a consumer multiplies 32 of the rows, so that left leaves shared memory once, and the two sums are added
// at the end of the item.
//
// FLOPs 2 M C R, issued as if R were 64. Bytes: 2 M C of left once from memory; right comes from L2 once an item. Through
// shared memory of a stage of 256 columns: 32 + 8 KB in and as much out, 640 clocks at 128 bytes, 51 bytes of left a
// clock, where an SM takes in 64 (model; not measured).
#pragma once

#include <lorafuse/ptx/convert.cuh>

#include "pipeline_sm90.cuh"

namespace lorafuse::sm90 {

// One of the two sums. column_blocks 0: it is not requested.
struct Sum {
  int C, column_blocks;
  void* out;              // [C, R], transposed [R, C]
  bool fp32, transposed;  // else out is of left's type
  float scale;

  // Of element (c, r) in out.
  LF_DEVICE int64_t place(int64_t c, int r, int R) const {
    return transposed ? r * static_cast<int64_t>(C) + c : c * R + r;
  }
};
struct SumMaps {
  TensorMap left, right;
};

// Calls f(sum, first column) for every item of block `index` of `blocks`.
template <int BLOCK_N, class F>
LF_DEVICE void for_each_item(const Sum (&sums)[2], int index, int blocks, F f) {
  for (int item = index; item < sums[0].column_blocks + sums[1].column_blocks; item += blocks) {
    const int sum = item < sums[0].column_blocks ? 0 : 1;
    f(sum, (item - sum * sums[0].column_blocks) * BLOCK_N);
  }
}

// Producer, one thread: columns of rows first … end, which a K-block's rows divide unless M is the end.
template <int BLOCK_M, int BLOCK_N>
LF_DEVICE void load_item(Pipeline<BLOCK_M, BLOCK_N>& pipeline, const SumMaps& maps, int first, int end, int column) {
  for (int row = first; row < end; row += BLOCK_K) {
    pipeline.acquire((kBoxElements + BLOCK_N) * kBoxRowBytes);
    ptx::tma_load(pipeline.a(), &maps.right, 0, row, pipeline.full());
    load_b<Major::MN>(pipeline, &maps.left, row, column, 0);
    pipeline.advance();
  }
}

// Both consumers.
LF_DEVICE void consumers_sync() { ptx::named_barrier_sync<3, 256>(); }

// Rounds a sum and stores it in its place.
template <class T>
LF_DEVICE void store_sum(const Sum& sum, int64_t place, float value) {
  value *= sum.scale;
  if (sum.fp32) {
    ptx::store_global(static_cast<float*>(sum.out) + place, value);
  } else {
    ptx::store_global(static_cast<T*>(sum.out) + place, ptx::from_float<T>(value));
  }
}

// Consumer: an item, in accumulators d; consumer 0 calls store(place, sum before its scale) for each of its elements.
// 64 rows of BLOCK_N floats, where tiles leave through, hold what consumer 1 has summed.
template <class T, int BLOCK_M, int BLOCK_N, class F>
LF_DEVICE void sum_item(float (&d)[BLOCK_N / 2], Pipeline<BLOCK_M, BLOCK_N>& pipeline, const Sum& sum, int first,
                        int end, int R, int column, int consumer, int thread, F store) {
  constexpr int kSteps = kStepsOfBlock / 2;
  const int lane = thread % 32, rows = consumer * kSteps * kStepElements;
  for (int row = first; row < end; row += BLOCK_K) {
    begin_stage(pipeline);
    multiply<T, BLOCK_N, Major::MN, kSteps, Major::MN>(d, pipeline.a() + rows * kBoxRowBytes,
                                                       pipeline.b() + rows * kBoxRowBytes, row > first);
    end_stage(pipeline, lane, row > first);
  }
  finish_blocks(pipeline, lane);

  float* others = reinterpret_cast<float*>(pipeline.output(0));
  const auto each = [&](auto f) {
    LF_UNROLL
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      const int r = fragment_row(thread, i), c = fragment_column(thread, i);
      if (r < R && column + c < sum.C) f(i, r, c);
    }
  };
  // a tile of this block may still be on its way out
  if (thread == 0) ptx::tma_store_wait_read<0>();
  if (consumer == 1) {
    // the sums of the item before have been read
    consumers_sync();
    each([&](int i, int r, int c) { ptx::store_shared(others + r * BLOCK_N + c, d[i]); });
    consumers_sync();
    return;
  }
  // consumer 1 may write
  consumers_sync();
  // consumer 1 has written
  consumers_sync();
  each([&](int i, int r, int c) {
    store(sum.place(column + c, r, R), d[i] + ptx::load_shared<float>(others + r * BLOCK_N + c));
  });
}

}  // namespace lorafuse::sm90

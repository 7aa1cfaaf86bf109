// From accumulators to global memory: bias, dropout's mask, rounding, and the store of a tile.
//
// A consumer warpgroup holds d[64, N_TILE] of its tile in fragments (fragment_row, fragment_column of layout.cuh).
// stmatrix puts them, rounded, into swizzled boxes of 64 columns in shared memory, and one thread asks TMA to store
// them: full cache lines, edges clipped by the hardware, and the tile leaves while the next one is multiplied.
#pragma once

#include <lorafuse/philox.cuh>
#include <lorafuse/ptx/convert.cuh>

#include "pipeline_sm90.cuh"

namespace lorafuse::sm90 {

// Adds bias[column …] to every row; columns from N on do not exist. `thread` is that of the warpgroup.
template <class T, int N_TILE>
LF_DEVICE void add_bias(float (&d)[N_TILE / 2], const T* bias, int column, int N, int thread) {
  LF_UNROLL
  for (int i = 0; i < N_TILE / 2; i += 4) {
    const int n = column + fragment_column(thread, i);
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

// Zeroes what dropout drops of rows row … row + 64 and columns column … of an input of K columns (a multiple of 4).
template <int N_TILE>
LF_DEVICE void drop(float (&d)[N_TILE / 2], const int64_t* seed, uint32_t drop_below, int row, int column, int64_t K,
                    int thread) {
  const uint64_t key = static_cast<uint64_t>(ptx::load_global(seed));
  // Lanes 2i and 2i + 1 hold neighbours of one counter, in two rows: one draws for the first row, one for the second.
  const bool odd = thread % 2 != 0;
  const int64_t first = (row + fragment_row(thread, odd ? 2 : 0)) * K + column;
  LF_UNROLL
  for (int i = 0; i < N_TILE / 2; i += 4) {
    uint32_t words[4];
    philox_4x32(key, static_cast<uint64_t>(first + fragment_column(thread, i)) / 4, words);
    const uint32_t other0 = ptx::shuffle_xor(odd ? words[0] : words[2], 1);
    const uint32_t other1 = ptx::shuffle_xor(odd ? words[1] : words[3], 1);
    if ((odd ? other0 : words[0]) < drop_below) d[i] = 0.0f;
    if ((odd ? other1 : words[1]) < drop_below) d[i + 1] = 0.0f;
    if ((odd ? words[2] : other0) < drop_below) d[i + 2] = 0.0f;
    if ((odd ? words[3] : other1) < drop_below) d[i + 3] = 0.0f;
  }
}

// The warpgroup's accumulators, rounded, into the boxes of 64 columns from `boxes` on.
template <class T, int N_TILE>
LF_DEVICE void write_boxes(const float (&d)[N_TILE / 2], uint8_t* boxes, int thread) {
  // lane l addresses row l % 8 of matrix l / 8: two matrices of rows for each of two of columns
  const int lane = thread % 32;
  const int box_row = thread / 32 * 16 + lane % 16;
  LF_UNROLL
  for (int i = 0; i < N_TILE / 2; i += 8) {
    const int n = i * 2;
    const uint32_t offset = box_offset(box_row, n % kBoxElements + lane / 16 * 8);
    uint8_t* box = boxes + n / kBoxElements * kBoxBytes;
    ptx::stmatrix(box + offset, ptx::pack<T>(d[i], d[i + 1]), ptx::pack<T>(d[i + 2], d[i + 3]),
                  ptx::pack<T>(d[i + 4], d[i + 5]), ptx::pack<T>(d[i + 6], d[i + 7]));
  }
}

// One thread: stores `count` boxes of 64 columns as a group of its own.
LF_DEVICE void store_boxes(const TensorMap* map, const uint8_t* boxes, int count, int row, int column) {
  for (int i = 0; i < count; ++i) ptx::tma_store(map, boxes + i * kBoxBytes, column + i * kBoxElements, row);
  ptx::tma_store_commit();
}

// Stores the warpgroup's 64 rows from `row` on; `boxes` is its part of the output tile (Pipeline::output).
template <class T, int N_TILE>
LF_DEVICE void store_tile(const float (&d)[N_TILE / 2], const TensorMap* map, uint8_t* boxes, int row, int column,
                          int consumer, int thread) {
  // the boxes may still be read for the tile before
  if (thread == 0) ptx::tma_store_wait_read<0>();
  consumer_sync(consumer);
  write_boxes<T, N_TILE>(d, boxes, thread);
  ptx::fence_proxy_async_shared();
  consumer_sync(consumer);
  if (thread == 0) store_boxes(map, boxes, N_TILE / kBoxElements, row, column);
}

// The same rows by ordinary stores, for a tile whose rows from row_end on are another's: `y` is [rows, N].
template <class T, int N_TILE>
LF_DEVICE void store_rows(const float (&d)[N_TILE / 2], T* y, int64_t stride, int row, int row_end, int column, int N,
                          int thread) {
  LF_UNROLL
  for (int i = 0; i < N_TILE / 2; i += 2) {
    const int m = row + fragment_row(thread, i), n = column + fragment_column(thread, i);
    if (m < row_end && n < N) {
      ptx::store_global(reinterpret_cast<uint32_t*>(y + m * stride + n), ptx::pack<T>(d[i], d[i + 1]));
    }
  }
}

}  // namespace lorafuse::sm90

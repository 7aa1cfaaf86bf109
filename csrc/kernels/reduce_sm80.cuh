// The reductions of the backward pass, each in one read of its long operand, deterministic:
//
//   dyb = scale · dy b    db = scale · dyᵀ xa    dbias = Σ dy         left = dy [M, C = N], right = xa [M, R], b [N, R]
//   da = dybᵀ drop(x)                                                 left = x [M, C = K],  right = dyb [M, R]
//
// One kernel does both. In its words: rows[m, r] = Σ_c left[m, c] b[c, r], columns[c, r] = Σ_m left[m, c] right[m, r],
// bias[c] = Σ_m left[m, c]; each is optional. The mask of dropout is drawn in place, as in project_sm80.cuh.
//
// Fused: one read of dy for three results; rounding of b; the mask. FLOPs: 2 M C R for each of rows and columns.
//
// The items of work, BLOCK_M rows of BLOCK_N columns, are listed column block by column block; block p of `blocks`
// takes one contiguous share of the list and keeps the column sums of its column block in registers. Per item it writes
// fp32 partial sums of rows, per column block it meets those of columns and bias. A second kernel adds them in the
// order of the list, scales once and rounds; and concurrently an adapter, for the product that follows. Reductions of
// several layers run in one launch of each (reduce_each_sm80.cu), block by block the same, so that no bit differs.
//
// Bytes: 2 M C of left once, and partials, written and read, mostly within L2:
//     8 R (M C / BLOCK_N + blocks · BLOCK_N + C), least where C / BLOCK_N = √(blocks C / M).
// At M = 8192, N = 4096, R = 16 on 132 SMs and BLOCK_N 256: dy 67.1 MB, 16.8 + 4.9 MB of partials, half of them writes;
// da only the latter. At R = 64 partials reach 87 MB: there a second read of dy would cost as much.
//
// Through shared memory, in units of the 32 KB of an item: left arrives, and is read for columns and for rows (3); b
// for every 16-row fragment (R / 16); right for every warp (8 · BLOCK_M · R · 2 bytes); parts of the row sums, written
// and read. R = 16: 3 + 1 + 0.5 + 0.25, 1220 clocks, 27 bytes of left a clock. R = 64: 3 + 4 + 2.25 + 1, 2620 clocks,
// 12.5 a clock. Measured on an H200 at R = 16: 34 µs, 2.1 TB/s, where the same without rows takes 21; two of three clocks
// no warp can issue, for three barriers an item and eight warps that do the same at the same time.
#pragma once

#include "round_sm80.cuh"

namespace lorafuse::skinny {

// A list of items shared out in order: block p of `blocks` (at most as many as items) has begin(p) … begin(p + 1).
struct Shares {
  int items, blocks;

  LF_HOST_DEVICE constexpr int begin(int block) const {
    return static_cast<int>(static_cast<int64_t>(items) * block / blocks);
  }
  LF_HOST_DEVICE constexpr int owner(int item) const {
    return static_cast<int>(((static_cast<int64_t>(item) + 1) * blocks - 1) / items);
  }
};

struct Reduce {
  int64_t M, C, R;
  const void* left;
  int64_t stride_left;
  const void* right;  // null: no column sums
  int64_t stride_right;
  const void* b;  // null: no row sums
  int64_t stride_b;
  bool b_fp32;
  const int64_t* seed;
  uint32_t drop_below;

  int block_n, row_blocks, column_blocks, rank_tiles;
  Shares shares;
  // partials; block p's of column block j are at slot p + j, which no other pair of a share's has
  int64_t pitch;   // R, or one more, so that pairs are aligned
  float* rows;     // [column_blocks, M, pitch]
  float* columns;  // [slots, block_n, pitch], transposed [slots, R, block_n]
  float* bias;     // [slots, block_n]; null: not requested
  // where `left` is the first or last of several chunks of rows, or one between: sums over the chunks so far
  float* carried_columns;  // as columns_out
  float* carried_bias;     // [C]
  bool is_first = true, is_last = true;

  float scale;
  void* rows_out;  // [M, R], zeros up to column row_columns
  int64_t stride_rows_out, row_columns;
  void* columns_out;  // [C, R], transposed [R, C]
  bool columns_fp32, transposed;
  void* bias_out;
  Round rounded;
};

template <class T, int BLOCK_M, int BLOCK_N, int RANKS>
struct ReduceShape {
  // of a warp: WARP_N columns for the column sums; 16 rows and PART_N columns for the row sums
  static constexpr int WARP_N = BLOCK_N / kWarps;
  static constexpr int kParts = kWarps / (BLOCK_M / 16);
  static constexpr int PART_N = BLOCK_N / kParts;
  using Left = SharedTile<T, BLOCK_M, BLOCK_N>;
  using Right = SharedTile<T, BLOCK_M, RANKS>;
  static constexpr int kBBytes = BLOCK_N * RANKS * 2;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;
  // an SM of an A100 gives one block 163 KB; with four stages 32 × 256 fits the 99 KB of smaller GPUs
  static constexpr int kFit = (160 * 1024 - kBBytes) / kStageBytes;
  static constexpr int kStages = kFit > 4 ? 4 : kFit;
  static constexpr int kSharedBytes = kStages * kStageBytes + kBBytes;
  static_assert(kStages >= 3 && (kParts - 1) * kPartBytes<BLOCK_M, RANKS> <= kStageBytes);
};

// b [BLOCK_N, RANKS] at (column, rank) of b [C, R], rounded to T, zeros outside; rows of b need no alignment.
template <class T, class B, int BLOCK_N, int RANKS>
LF_DEVICE void load_b(uint8_t* tile, const Reduce& p, int64_t column, int rank) {
  const B* b = static_cast<const B*>(p.b);
  for (int i = static_cast<int>(threadIdx.x); i < BLOCK_N * RANKS / 2; i += kThreads) {
    const int n = i / (RANKS / 2), r = i % (RANKS / 2) * 2;
    const B* from = b + (column + n) * p.stride_b + rank + r;
    const bool inside = column + n < p.C;
    const float low = inside && rank + r < p.R ? ptx::to_float(ptx::load_global(from)) : 0.0f;
    const float high = inside && rank + r + 1 < p.R ? ptx::to_float(ptx::load_global(from + 1)) : 0.0f;
    ptx::store_shared(tile + chunk_offset<RANKS / 8>(n, r / 8) + r % 8 * 2, ptx::pack<T>(low, high));
  }
}

// Two elements of 1 in T.
template <class T>
LF_DEVICE uint32_t ones() {
  return ptx::pack<T>(1.0f, 1.0f);
}

// What block `number` of a reduction's does.
template <class T, int BLOCK_M, int BLOCK_N, int RANKS>
LF_DEVICE void reduce_block(const Reduce& p, int number, uint8_t* shared) {
  using S = ReduceShape<T, BLOCK_M, BLOCK_N, RANKS>;
  uint8_t* b_tile = shared + S::kStages * S::kStageBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int part = warp % S::kParts, part_row = warp / S::kParts * 16;
  // blocks of one share and several rank tiles run side by side, so that all but one find `left` in L2
  const int block = number / p.rank_tiles, rank = number % p.rank_tiles * RANKS;
  const int first = p.shares.begin(block), last = p.shares.begin(block + 1);
  const bool wants_bias = p.bias && rank == 0;
  const uint64_t seed = p.seed ? static_cast<uint64_t>(ptx::load_global(p.seed)) : 0;

  const auto fetch = [&](int item) {
    if (item < last) {
      uint8_t* stage = shared + (item - first) % S::kStages * S::kStageBytes;
      const int64_t row = static_cast<int64_t>(item % p.row_blocks) * BLOCK_M;
      const int64_t column = static_cast<int64_t>(item / p.row_blocks) * BLOCK_N;
      S::Left::copy(stage, static_cast<const T*>(p.left), p.stride_left, row, p.M, column, p.C);
      if (p.right) {
        S::Right::copy(stage + S::Left::kBytes, static_cast<const T*>(p.right), p.stride_right, row, p.M, rank, p.R);
      }
    }
    // an empty group past the end, so that the wait counts the same
    ptx::copy_async_commit();
  };

  Accumulator<RANKS> columns[S::WARP_N / 16];
  float bias[S::WARP_N / 16][4];
  for (int i = 0; i < S::kStages - 1; ++i) fetch(first + i);
  LF_NO_UNROLL
  for (int item = first; item < last; ++item) {
    uint8_t* left = shared + (item - first) % S::kStages * S::kStageBytes;
    const uint8_t* right = left + S::Left::kBytes;
    const int i_row = item % p.row_blocks, i_column = item / p.row_blocks;
    const int64_t row = static_cast<int64_t>(i_row) * BLOCK_M, column = static_cast<int64_t>(i_column) * BLOCK_N;
    ptx::copy_async_wait<S::kStages - 2>();
    if (p.seed) S::Left::drop(left, seed, p.drop_below, row, p.M, column, p.C);
    // what every warp has read of the stage before and of b is done with after this, and free to be written again
    ptx::block_sync();
    fetch(item + S::kStages - 1);

    if (item == first || i_row == 0) {
      if (p.b) {
        p.b_fp32 ? load_b<T, float, BLOCK_N, RANKS>(b_tile, p, column, rank)
                 : load_b<T, T, BLOCK_N, RANKS>(b_tile, p, column, rank);
        // all of b is there
        ptx::block_sync();
      }
      LF_UNROLL
      for (int i = 0; i < S::WARP_N / 16 * RANKS / 2; ++i) columns[i / (RANKS / 2)][i / 4 % (RANKS / 8)][i % 4] = 0.0f;
      LF_UNROLL
      for (int i = 0; i < S::WARP_N / 4; ++i) bias[i / 4][i % 4] = 0.0f;
    }

    if (p.right || wants_bias) {
      LF_UNROLL
      for (int k = 0; k < BLOCK_M; k += 16) {
        uint32_t b[RANKS / 16][4] = {};
        if (p.right) {
          LF_UNROLL
          for (int n = 0; n < RANKS / 16; ++n) fragment_rows_first<RANKS>(b[n], right, k, 16 * n, true);
        }
        LF_UNROLL
        for (int i = 0; i < S::WARP_N / 16; ++i) {
          uint32_t a[4];
          fragment_columns_first<BLOCK_N>(a, left, k, warp * S::WARP_N + i * 16, true);
          if (p.right) multiply<T, RANKS>(columns[i], a, b);
          // a product with ones: each of its eight columns is the sum over the rows
          if (wants_bias) ptx::mma<T>(bias[i], a, ones<T>(), ones<T>());
        }
      }
    }

    if (p.b) {
      Accumulator<RANKS> sums[1] = {};
      LF_UNROLL
      for (int k = 0; k < S::PART_N; k += 16) {
        uint32_t a[4], b[RANKS / 16][4];
        fragment_rows_first<BLOCK_N>(a, left, part_row, part * S::PART_N + k, false);
        LF_UNROLL
        for (int n = 0; n < RANKS / 16; ++n) {
          fragment_rows_first<RANKS>(b[n], b_tile, part * S::PART_N + k, 16 * n, true);
        }
        multiply<T, RANKS>(sums[0], a, b);
      }
      // the parts take the place of `left`, once every warp has read it
      ptx::block_sync();
      add_parts<S::kParts, BLOCK_M, RANKS>(sums, left, part, part_row);
      LF_UNROLL
      for (int i = 0; i < RANKS / 4; ++i) {
        const int n = i / 2, half = i % 2, c = rank + fragment_column(n);
        const int64_t m = row + part_row + fragment_row(half);
        if (part > 0 || m >= p.M || c >= p.R) continue;
        float* place = p.rows + (i_column * p.M + m) * p.pitch + c;
        ptx::store_global(reinterpret_cast<Pair*>(place), Pair{sums[0][n][2 * half], sums[0][n][2 * half + 1]});
      }
    }

    if (item + 1 < last && i_row + 1 < p.row_blocks) continue;
    const int64_t slot = block + i_column;
    LF_UNROLL
    for (int i = 0; i < S::WARP_N / 8; ++i) {
      const int half = i % 2, n = warp * S::WARP_N + i / 2 * 16 + fragment_row(half);
      if (column + n >= p.C) continue;
      if (wants_bias && fragment_column(0) == 0) {
        ptx::store_global(p.bias + slot * BLOCK_N + n, bias[i / 2][2 * half]);
      }
      if (!p.right) continue;
      LF_UNROLL
      for (int j = 0; j < RANKS / 8; ++j) {
        const int c = rank + fragment_column(j);
        const float low = columns[i / 2][j][2 * half], high = columns[i / 2][j][2 * half + 1];
        if (p.transposed) {
          float* place = p.columns + (slot * p.R + c) * BLOCK_N + n;
          if (c < p.R) ptx::store_global(place, low);
          if (c + 1 < p.R) ptx::store_global(place + BLOCK_N, high);
        } else if (c < p.R) {
          float* place = p.columns + (slot * BLOCK_N + n) * p.pitch + c;
          ptx::store_global(reinterpret_cast<Pair*>(place), Pair{low, high});
        }
      }
    }
  }
}

template <class T, int BLOCK_M, int BLOCK_N, int RANKS>
LF_KERNEL_SHARED(kThreads, 1) reduce_kernel(const Reduce p) {
  LF_DYNAMIC_SHARED(shared);
  reduce_block<T, BLOCK_M, BLOCK_N, RANKS>(p, static_cast<int>(blockIdx.x), shared);
}

// In that order, eight loads at a time in flight.
LF_DEVICE float sum_in_order(const float* p, int count, int64_t step) {
  float sum = 0.0f;
  LF_NO_UNROLL
  for (int i = 0; i < count; i += 8) {
    float values[8];
    LF_UNROLL
    for (int j = 0; j < 8; ++j) values[j] = i + j < count ? ptx::load_global(p + (i + j) * step) : 0.0f;
    LF_UNROLL
    for (int j = 0; j < 8; ++j) sum += values[j];
  }
  return sum;
}

template <class T>
LF_DEVICE void store_result(void* out, int64_t index, float value, bool fp32) {
  if (fp32) {
    ptx::store_global(static_cast<float*>(out) + index, value);
  } else {
    ptx::store_global(static_cast<T*>(out) + index, ptx::from_float<T>(value));
  }
}

// Adds what the chunks of rows before have summed. False: more chunks follow, and the sum is carried on.
LF_DEVICE bool carry(const Reduce& p, float* carried, int64_t i, float& sum) {
  if (!p.is_first) sum += ptx::load_global(carried + i);
  if (!p.is_last) ptx::store_global(carried + i, sum);
  return p.is_last;
}

// The partials' sums, one result a thread, in block `block` of a reduction's: blocks of rows first, then of columns, of
// bias, of the adapter.
template <class T>
LF_DEVICE void sum_block(const Reduce& p, int64_t block) {
  // takes the block's number from the list of a result of `size` elements
  const auto element = [&](int64_t size, int64_t& index) {
    index = block * kThreads + static_cast<int64_t>(threadIdx.x);
    block -= ceil_div<int64_t>(size, kThreads);
    return block < 0;
  };
  // the slots of column block j are owner(its first item) + j … owner(its last) + j
  const auto first_slot = [&](int64_t c) {
    const int j = static_cast<int>(c / p.block_n);
    return p.shares.owner(j * p.row_blocks) + j;
  };
  const auto slots = [&](int64_t c) {
    const int j = static_cast<int>(c / p.block_n), last = (j + 1) * p.row_blocks - 1;
    return p.shares.owner(last) - p.shares.owner(j * p.row_blocks) + 1;
  };

  int64_t i;
  if (element(p.rows_out ? p.M * p.row_columns : 0, i)) {
    const int64_t m = i / p.row_columns, r = i % p.row_columns;
    if (m >= p.M) return;
    const float sum = r < p.R ? sum_in_order(p.rows + m * p.pitch + r, p.column_blocks, p.M * p.pitch) : 0.0f;
    store_result<T>(p.rows_out, m * p.stride_rows_out + r, p.scale * sum, false);
  } else if (element(p.columns_out ? p.C * p.R : 0, i)) {
    if (i >= p.C * p.R) return;
    const int64_t c = p.transposed ? i % p.C : i / p.R, r = p.transposed ? i / p.C : i % p.R, n = c % p.block_n;
    const int64_t slot_size = p.block_n * (p.transposed ? p.R : p.pitch);
    const float* from = p.columns + first_slot(c) * slot_size + (p.transposed ? r * p.block_n + n : n * p.pitch + r);
    float sum = sum_in_order(from, slots(c), slot_size);
    if (carry(p, p.carried_columns, i, sum)) store_result<T>(p.columns_out, i, p.scale * sum, p.columns_fp32);
  } else if (element(p.bias_out ? p.C : 0, i)) {
    if (i >= p.C) return;
    const float* from = p.bias + static_cast<int64_t>(first_slot(i)) * p.block_n + i % p.block_n;
    float sum = sum_in_order(from, slots(i), p.block_n);
    if (carry(p, p.carried_bias, i, sum)) store_result<T>(p.bias_out, i, sum, false);
  } else if (element(round_chunks(p.rounded), i)) {
    round_chunk<T>(p.rounded, i);
  }
}

template <class T>
LF_KERNEL_SHARED(kThreads, 4) sum_kernel(const Reduce p) {
  sum_block<T>(p, static_cast<int64_t>(blockIdx.x));
}

}  // namespace lorafuse::skinny

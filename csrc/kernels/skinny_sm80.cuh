// What the memory-bound passes share: tiles in shared memory, how they are copied, masked and read as fragments.
//
// Project (project_sm80.cuh) and reduce (reduce_sm80.cuh) read a long matrix once and multiply it by one of few
// columns, the ranks. Each is bound by that read. What it takes to run at the speed of memory:
//
//   bytes in flight = bandwidth × latency (Little's law), of one SM:
//     A100 80 GB  2.0 TB/s × 0.6 µs / 108 SMs = 11 KB
//     H100 SXM    3.4 TB/s × 0.7 µs / 132     = 18 KB
//     H200        4.8 TB/s × 0.7 µs / 132     = 25 KB
//   so that rings keep at least 32 KB a multiprocessor in flight while a tile is multiplied;
//   bytes a clock = 13 (A100), 15 (H100), 21 (H200) of x or dy that an SM must consume; shared memory moves 128, and
//   each byte goes through it once on arrival and once a fragment it is part of. The file of each kernel adds this up.
//
// (Bandwidths are the vendor's, latencies rounded up from published micro-benchmarks; nothing here was measured.)
#pragma once

#include <lorafuse/common.cuh>
#include <lorafuse/philox.cuh>
#include <lorafuse/ptx/barrier.cuh>
#include <lorafuse/ptx/convert.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/mma.cuh>

namespace lorafuse::skinny {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunkBytes = 16;

struct alignas(8) Pair {
  float first, second;
};
struct alignas(16) Chunk {
  uint32_t words[4];
};

// Offset of a 16-byte chunk in a tile with rows of CHUNKS chunks. Eight consecutive rows of one chunk, what ldmatrix
// reads at a time, lie in eight different groups of four banks; so do four rows of two chunks, what a half-warp reads
// of fp32 pairs (hence the rotation of the row's bits); and consecutive chunks of a row, as copies arrive.
template <int CHUNKS>
LF_HOST_DEVICE constexpr int chunk_offset(int row, int chunk) {
  constexpr int kRowsALine = CHUNKS < 8 ? 8 / CHUNKS : 1;
  const int swizzle = CHUNKS < 8 ? row / kRowsALine % CHUNKS : (row & 3) << 1 | (row >> 2 & 1);
  return (row * CHUNKS + (chunk ^ swizzle)) * kChunkBytes;
}

// A tile of ROWS rows and COLUMNS columns of `Element`, copied by the whole block: thread t has one chunk of every
// kRowStep-th row, the same in every function below.
template <class Element, int ROWS, int COLUMNS>
struct SharedTile {
  static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Element));
  static constexpr int kChunks = COLUMNS / kChunkElements;
  static constexpr int kBytes = ROWS * kChunks * kChunkBytes;
  static constexpr int kRowStep = kThreads / kChunks;
  static_assert(COLUMNS % kChunkElements == 0 && kThreads % kChunks == 0 && kChunks > 1);

  // Starts to copy the tile at (row, column) of a matrix of `rows` rows and `columns` columns; zeros outside.
  LF_DEVICE static void copy(uint8_t* tile, const Element* matrix, int64_t stride, int64_t row, int64_t rows,
                             int64_t column, int64_t columns) {
    const int thread = static_cast<int>(threadIdx.x), c = thread % kChunks;
    const int elements = clamp(columns - column - c * kChunkElements, kChunkElements);
    const int bytes = elements * static_cast<int>(sizeof(Element)), height = clamp(rows - row, ROWS);
    const Element* from = matrix + (row + thread / kChunks) * stride + column + c * kChunkElements;
    LF_UNROLL
    for (int i = 0; i < ceil_div(ROWS, kRowStep); ++i) {
      const int r = thread / kChunks + i * kRowStep;
      if (ROWS % kRowStep == 0 || r < ROWS) {
        ptx::copy_async(tile + chunk_offset<kChunks>(r, c), from, r < height ? bytes : 0);
      }
      from += kRowStep * stride;
    }
  }

  // Zeroes what dropout drops, of elements of 16 bits, each thread in the chunks that it has copied itself: between
  // its wait and the block's barrier. The place for anything else that is to happen to x on its way, like a norm.
  LF_DEVICE static void drop(uint8_t* tile, uint64_t seed, uint32_t drop_below, int64_t row, int64_t rows,
                             int64_t column, int64_t columns) {
    static_assert(sizeof(Element) == 2);
    const int thread = static_cast<int>(threadIdx.x), c = thread % kChunks, height = clamp(rows - row, ROWS);
    column += c * kChunkElements;
    if (column >= columns) return;
    LF_NO_UNROLL
    for (int r = thread / kChunks; r < height; r += kRowStep) {
      const uint32_t keep = keep_chunk(seed, drop_below, (row + r) * columns + column);
      uint8_t* place = tile + chunk_offset<kChunks>(r, c);
      Chunk chunk = ptx::load_shared<Chunk>(place);
      LF_UNROLL
      for (int w = 0; w < 4; ++w) {
        chunk.words[w] &= (keep >> 2 * w & 1 ? 0xffffu : 0u) | (keep >> 2 * w & 2 ? 0xffff0000u : 0u);
      }
      ptx::store_shared(place, chunk);
    }
  }

 private:
  // `left`, within 0 … most.
  LF_DEVICE static int clamp(int64_t left, int most) {
    return left <= 0 ? 0 : left < most ? static_cast<int>(left) : most;
  }
  // Bit j: whether element first + j is kept, of eight. They share two counters, or three where `first` is no multiple
  // of 4.
  LF_DEVICE static uint32_t keep_chunk(uint64_t seed, uint32_t drop_below, int64_t first) {
    const int skip = static_cast<int>(first & 3);
    uint32_t keep = 0;
    LF_UNROLL
    for (int g = 0; g < 3; ++g) {
      if (g == 2 && skip == 0) continue;
      uint32_t words[4];
      philox_4x32(seed, static_cast<uint64_t>(first / 4 + g), words);
      LF_UNROLL
      for (int j = 0; j < 4; ++j) keep |= (words[j] >= drop_below ? 1u : 0u) << (4 * g + j);
    }
    return keep >> skip;
  }
};

// Fragments of mma m16n8k16 from tiles of 16-bit elements. A 16 × 16 piece at (row, column) is four 8 × 8 matrices, and
// lane l gives the address of a row of matrix l / 8. Two orders serve all cases:
//   rows first:     matrices (0, 0), (8, 0), (0, 8), (8, 8): a from its rows, and b of two column blocks from the rows
//                   of its reduction index, transposed;
//   columns first:  matrices (0, 0), (0, 8), (8, 0), (8, 8): b of two column blocks from its columns, and a from the
//                   rows of its reduction index, transposed.
// Of b, values 0 and 1 are of the first eight columns, 2 and 3 of the others.
template <int COLUMNS>
LF_DEVICE void fragment_rows_first(uint32_t (&values)[4], const uint8_t* tile, int row, int column, bool transposed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint8_t* p = tile + chunk_offset<COLUMNS / 8>(row + lane % 16, column / 8 + lane / 16);
  transposed ? ptx::ldmatrix_transposed(values, p) : ptx::ldmatrix(values, p);
}
template <int COLUMNS>
LF_DEVICE void fragment_columns_first(uint32_t (&values)[4], const uint8_t* tile, int row, int column,
                                      bool transposed) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const uint8_t* p = tile + chunk_offset<COLUMNS / 8>(row + lane % 8 + lane / 16 * 8, column / 8 + lane / 8 % 2);
  transposed ? ptx::ldmatrix_transposed(values, p) : ptx::ldmatrix(values, p);
}

// Accumulators of a warp, 16 rows and RANKS columns: element i of block n is at row l / 4 + i / 2 * 8 and column
// 8 n + l % 4 * 2 + i % 2 in lane l.
template <int RANKS>
using Accumulator = float[RANKS / 8][4];

template <class T, int RANKS>
LF_DEVICE void multiply(Accumulator<RANKS>& d, const uint32_t (&a)[4], const uint32_t (&b)[RANKS / 16][4]) {
  LF_UNROLL
  for (int n = 0; n < RANKS / 16; ++n) {
    ptx::mma<T>(d[2 * n], a, b[n][0], b[n][1]);
    ptx::mma<T>(d[2 * n + 1], a, b[n][2], b[n][3]);
  }
}

LF_DEVICE int fragment_row(int half) { return static_cast<int>(threadIdx.x) % 32 / 4 + half * 8; }
LF_DEVICE int fragment_column(int n) { return 8 * n + static_cast<int>(threadIdx.x) % 4 * 2; }

// Where PARTS warps have a summand each of the same rows: part 0 ends with the sums, added in the order of the parts.
// `shared` is (PARTS - 1) ROWS (RANKS + 8) floats, free when all threads call it; the eight more keep four rows of two
// columns, what a half-warp moves, in different banks. The caller must synchronize before it is written again.
template <int ROWS, int RANKS>
constexpr int kPartBytes = ROWS * (RANKS + 8) * 4;
template <int PARTS, int ROWS, int RANKS, int BLOCKS>
LF_DEVICE void add_parts(Accumulator<RANKS> (&d)[BLOCKS], uint8_t* shared, int part, int row) {
  const auto place = [&](int of_part, int block, int n, int half) {
    const int r = row + block * 16 + fragment_row(half);
    return shared + (of_part - 1) * kPartBytes<ROWS, RANKS> + (r * (RANKS + 8) + fragment_column(n)) * 4;
  };
  if (part > 0) {
    LF_UNROLL
    for (int i = 0; i < BLOCKS * RANKS / 4; ++i) {
      const int block = i / (RANKS / 4), n = i / 2 % (RANKS / 8), half = i % 2;
      ptx::store_shared(place(part, block, n, half), Pair{d[block][n][2 * half], d[block][n][2 * half + 1]});
    }
  }
  ptx::block_sync();
  if (part > 0) return;
  LF_NO_UNROLL
  for (int other = 1; other < PARTS; ++other) {
    LF_UNROLL
    for (int i = 0; i < BLOCKS * RANKS / 4; ++i) {
      const int block = i / (RANKS / 4), n = i / 2 % (RANKS / 8), half = i % 2;
      const Pair pair = ptx::load_shared<Pair>(place(other, block, n, half));
      d[block][n][2 * half] += pair.first;
      d[block][n][2 * half + 1] += pair.second;
    }
  }
}

}  // namespace lorafuse::skinny

// Where elements lie: the 128-byte swizzle of TMA, matrix descriptors of wgmma, fragments of its accumulators.
//
// Everything is arithmetic that a host can run; csrc/emu/layout_check.cpp compares it with CuTe and the PTX manual.
//
// A tile is one box of TMA, or several, in shared memory that starts on a 1024-byte boundary. A row of a box is 64
// elements of 16 bits, 128 bytes; the swizzle permutes the eight 16-byte pieces of a row by the row's number modulo 8.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

// Reduction elements of one wgmma.
constexpr int kStepElements = 16;
// Elements of 16 bits in a row of a box.
constexpr int kBoxElements = 64;
constexpr int kBoxRowBytes = kBoxElements * 2;

// Byte offset in a tile → where it lies: bits 4–6 (the piece) take bits 7–9 (the row) by exclusive or.
LF_HOST_DEVICE constexpr uint32_t swizzle_128(uint32_t offset) { return offset ^ ((offset >> 3) & 0x70); }

// Of element (row, column) of a box.
LF_HOST_DEVICE constexpr uint32_t box_offset(int row, int column) {
  return swizzle_128(static_cast<uint32_t>(row * kBoxRowBytes + column * 2));
}

// The descriptor of PTX, "asynchronous warpgroup level matrix shared memory layout": address, leading and stride byte
// offsets in units of 16 bytes at bits 0, 16 and 32, and the swizzle (1: 128 bytes) at bit 62.
LF_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62;
}

// The reduction index is contiguous: box rows are rows of A, or columns of B. Eight rows are 1024 bytes; a step of the
// reduction stays within a row, so that the leading offset is not used (1 by convention).
LF_HOST_DEVICE constexpr uint64_t k_major_descriptor(uint32_t address) { return matrix_descriptor(address, 16, 1024); }
// What the next 16 reduction elements add to it: 32 bytes; the hardware swizzles the address that results.
constexpr uint64_t kStepKMajor = kStepElements * 2 / 16;

// Columns of B are contiguous: a box holds 64 of them, its rows are `box_rows` reduction elements, and the next 64
// columns are the next box (leading offset). Eight reduction elements are 1024 bytes (stride offset).
LF_HOST_DEVICE constexpr uint64_t mn_major_descriptor(uint32_t address, int box_rows) {
  return matrix_descriptor(address, static_cast<uint32_t>(box_rows * kBoxRowBytes), 1024);
}
// What the next 16 reduction elements, 16 rows of the box, add to it.
constexpr uint64_t kStepMNMajor = kStepElements * kBoxRowBytes / 16;

// Row (0 … 63) and column of register `i` of a wgmma accumulator in thread `t` of the warpgroup.
LF_HOST_DEVICE constexpr int fragment_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
LF_HOST_DEVICE constexpr int fragment_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

}  // namespace lorafuse

#include "wgmma.hpp"

#include <algorithm>
#include <cstring>

#include "engine.hpp"
#include "numbers.hpp"

namespace lorafuse::emu {
namespace {

// A signalling pattern that no kernel computes.
constexpr uint32_t kPoison = 0x7fa0dead;

// A matrix in shared memory as a descriptor gives it, PTX ISA 9.7.15.5.1.2. Bits 0-13: start address / 16; 16-29: the
// leading dimension's byte offset / 16; 32-45: the stride dimension's / 16; 49-51: base offset; 62-63: swizzle.
struct Matrix {
  uint32_t start, leading, stride;
  bool mn_major;
  // Of a row's bytes the binary logarithm: those of the swizzle, or 16.
  uint32_t row_shift, mask;

  // Of 8 elements that are contiguous: the shared address. With T = 8 elements of 16 bytes and rows of S T, the
  // canonical layouts are
  //   K-major   ((8, m), (T, 2k)) : ((S T, SBO), (1, T))         SBO from 8 rows to the next 8
  //   MN-major  ((T, S, m), (8, k)) : ((1, T, LBO), (S T, SBO))  LBO from a row's columns to the next, SBO from 8
  //                                                              reduction indices to the next 8
  // Without a swizzle S is 1, K-major has LBO from 8 reduction indices to the next 8, and MN-major's two change places.
  uint32_t chunk(uint32_t mn, uint32_t k) const {
    if (!mn_major) return swizzled(start + (mn >> 3) * stride + (k >> 3) * leading + ((mn & 7) << row_shift), mask);
    const uint32_t in_row = mn * 2 & ((1u << row_shift) - 1), row = (k >> 3) * stride + ((k & 7) << row_shift);
    return swizzled(start + (mn >> (row_shift - 1)) * leading + row + in_row, mask);
  }
};

Matrix decode(uint64_t descriptor, bool mn_major, const char* operand) {
  constexpr Swizzle kModes[] = {Swizzle::kNone, Swizzle::k128, Swizzle::k64, Swizzle::k32};
  constexpr uint32_t kRowShifts[] = {4, 7, 6, 5};
  const uint32_t mode = static_cast<uint32_t>(descriptor >> 62), base = descriptor >> 49 & 7;
  Matrix matrix{static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
                static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4, mn_major, kRowShifts[mode],
                swizzle_mask(kModes[mode])};
  if (base != 0) fail("wgmma: the descriptor of ", operand, " has base offset ", base, "; only 0 is modelled");
  if (matrix.start & matrix.mask << 3) {
    fail("wgmma: ", operand, " starts at ", hex(matrix.start), ", inside the ", swizzle_period(kModes[mode]),
         " bytes of the swizzle's pattern");
  }
  if (mode == 0 && mn_major) std::swap(matrix.leading, matrix.stride);
  if (mode != 0 && !mn_major) matrix.leading = 16;
  return matrix;
}

// Row and column of d in register i of thread t of the warpgroup (PTX ISA, figure of the fragment of d).
struct Place {
  int row, column;
};
Place place(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + (i >> 1 & 1) * 8, (i >> 2) * 8 + t % 4 * 2 + (i & 1)};
}

void check_chunk(const Block& block, uint32_t address, const char* operand) {
  if (address < block.begin || address + 16 > block.end) {
    fail("wgmma: ", operand, " reaches shared address ", hex(address), ", outside of the block's memory, ",
         hex(block.begin), " to ", hex(block.end));
  }
}

// The lines that rows [first, end) of the matrix lie in, each once.
void collect_lines(const Block& block, const Matrix& matrix, uint32_t first, uint32_t end, const char* operand,
                   std::vector<uint32_t>& lines) {
  const uint32_t mn_step = matrix.mn_major ? 8 : 1, k_step = matrix.mn_major ? 1 : 8;
  uint32_t last = UINT32_MAX;
  for (uint32_t k = 0; k < 16; k += k_step) {
    for (uint32_t mn = first; mn < end; mn += mn_step) {
      const uint32_t address = matrix.chunk(mn, k);
      check_chunk(block, address, operand);
      if (address / 128 != last) lines.push_back(last = address / 128);
    }
  }
  std::sort(lines.begin(), lines.end());
  lines.erase(std::unique(lines.begin(), lines.end()), lines.end());
}

// fp16 is converted through a table: it is most of the work otherwise.
const float* fp16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) values[i] = fp16_value(static_cast<uint16_t>(i));
    return values;
  }();
  return table.data();
}

void convert(Element element, const uint8_t* from, float* to) {
  uint16_t bits[8];
  std::memcpy(bits, from, sizeof(bits));
  if (element == Element::kBF16) {
    for (int i = 0; i < 8; ++i) to[i] = bf16_value(bits[i]);
  } else {
    const float* table = fp16_table();
    for (int i = 0; i < 8; ++i) to[i] = table[bits[i]];
  }
}

// d[64, columns] (+)= a[64, 16] b[16, columns]: `kRows` rows and 16 columns of d stay in registers, which hold `Floats`
// each. Products and sums are rounded apart, whatever the registers: no bit depends on the machine.
template <class Floats, int kRows>
[[gnu::always_inline]] inline void multiply_by(const float* a, const float* b, float* d, int columns, bool accumulate) {
  constexpr int kParts = 16 * sizeof(float) / sizeof(Floats);
  for (int m = 0; m < 64; m += kRows) {
    for (int n = 0; n < columns; n += 16) {
      Floats sums[kRows][kParts] = {};
#pragma GCC unroll 4
      for (int r = 0; r < kRows && accumulate; ++r) std::memcpy(sums[r], d + (m + r) * columns + n, sizeof(sums[r]));
      for (int k = 0; k < 16; ++k) {
        Floats row[kParts];
        std::memcpy(row, b + k * columns + n, sizeof(row));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int i = 0; i < kParts; ++i) sums[r][i] += a[(m + r) * 16 + k] * row[i];
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) std::memcpy(d + (m + r) * columns + n, sums[r], sizeof(sums[r]));
    }
  }
}

using FourFloats = float __attribute__((vector_size(16)));
using EightFloats = float __attribute__((vector_size(32)));

#ifdef __x86_64__
[[gnu::target("avx2")]] void multiply_avx2(const float* a, const float* b, float* d, int columns, bool accumulate) {
  multiply_by<EightFloats, 4>(a, b, d, columns, accumulate);
}
#endif

void multiply(const float* a, const float* b, float* d, int columns, bool accumulate) {
#ifdef __x86_64__
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return multiply_avx2(a, b, d, columns, accumulate);
#endif
  multiply_by<FourFloats, 2>(a, b, d, columns, accumulate);
}

WgmmaOperation& operation_at(Warpgroup& warpgroup, uint64_t number) {
  return warpgroup.operations[number - warpgroup.first];
}

Accumulator* find_accumulator(Warpgroup& warpgroup, int t, const float* d) {
  for (const auto& accumulator : warpgroup.accumulators) {
    if (accumulator->registers[t] == d) return accumulator.get();
  }
  return nullptr;
}

void take_registers(Accumulator& accumulator, int t, float* d) {
  for (int i = 0; i < accumulator.columns / 2; ++i) {
    const Place at = place(t, i);
    accumulator.values[static_cast<size_t>(at.row * accumulator.columns + at.column)] = d[i];
    std::memcpy(d + i, &kPoison, 4);
  }
  accumulator.registers[t] = d;
  ++accumulator.threads;
}

void give_registers(Accumulator& accumulator, int t) {
  float* d = accumulator.registers[t];
  for (int i = 0; i < accumulator.columns / 2; ++i) {
    uint32_t bits;
    std::memcpy(&bits, d + i, 4);
    if (checks() && bits != kPoison) {
      fail("register ", i, " of an accumulator was written while a wgmma on it was in flight");
    }
    const Place at = place(t, i);
    d[i] = accumulator.values[static_cast<size_t>(at.row * accumulator.columns + at.column)];
  }
  accumulator.registers[t] = nullptr;
  --accumulator.threads;
}

// A warp's reads begin when its first lane issues the product.
void begin_reads(Thread& thread, Warpgroup& warpgroup, WgmmaOperation& operation, uint32_t warp) {
  if (!checks() || (operation.checked_warps >> warp & 1)) return;
  operation.checked_warps |= 1u << warp;
  if (operation.b_lines.empty()) {
    collect_lines(*warpgroup.block, decode(operation.b, operation.b_is_mn_major, "b"), 0,
                  static_cast<uint32_t>(operation.columns), "b", operation.b_lines);
  }
  if (!operation.a_values) {
    collect_lines(*warpgroup.block, decode(operation.a, operation.a_is_mn_major, "a"), warp * 16, warp * 16 + 16, "a",
                  operation.a_lines[warp]);
  }
  for (const auto* lines : {&operation.a_lines[warp], &operation.b_lines}) {
    for (const uint32_t line : *lines) warpgroup.block->shadow->begin_async_read(thread, line, "wgmma");
  }
}

// And end when one of its lanes has waited.
void end_reads(Thread& thread, Warpgroup& warpgroup, WgmmaOperation& operation, uint32_t warp) {
  if (operation.retired_warps >> warp & 1) return;
  operation.retired_warps |= 1u << warp;
  if (!checks()) return;
  for (const auto* lines : {&operation.a_lines[warp], &operation.b_lines}) {
    for (const uint32_t line : *lines) warpgroup.block->shadow->end_async_read(thread, line);
  }
}

}  // namespace

void execute(Warpgroup& warpgroup) {
  const WgmmaOperation& operation = operation_at(warpgroup, warpgroup.executed);
  const Block& block = *warpgroup.block;
  static float a[64 * 16], b[16 * 256];
  const Matrix b_matrix = decode(operation.b, operation.b_is_mn_major, "b");
  const auto fetch = [&](const Matrix& matrix, uint32_t mn, uint32_t k, const char* operand, float* to) {
    const uint32_t address = matrix.chunk(mn, k);
    check_chunk(block, address, operand);
    convert(operation.element, block.window + address, to);
  };
  const float* a_values = a;
  if (operation.a_values) {
    a_values = operation.a_values->data();
  } else if (const Matrix matrix = decode(operation.a, operation.a_is_mn_major, "a"); matrix.mn_major) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t m = 0; m < 64; m += 8) {
        float values[8];
        fetch(matrix, m, k, "a", values);
        for (uint32_t i = 0; i < 8; ++i) a[(m + i) * 16 + k] = values[i];
      }
    }
  } else {
    for (uint32_t m = 0; m < 64; ++m) {
      for (uint32_t k = 0; k < 16; k += 8) fetch(matrix, m, k, "a", a + m * 16 + k);
    }
  }
  const uint32_t columns = static_cast<uint32_t>(operation.columns);
  if (operation.b_is_mn_major) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t n = 0; n < columns; n += 8) fetch(b_matrix, n, k, "b", b + k * columns + n);
    }
  } else {
    for (uint32_t n = 0; n < columns; ++n) {
      for (uint32_t k = 0; k < 16; k += 8) {
        float values[8];
        fetch(b_matrix, n, k, "b", values);
        for (uint32_t i = 0; i < 8; ++i) b[(k + i) * columns + n] = values[i];
      }
    }
  }
  multiply(a_values, b, operation.accumulator->values.data(), operation.columns, operation.accumulate);
  ++warpgroup.executed;
  ++mutable_statistics().wgmmas;
  engine->wake(warpgroup.waiting);
}

bool executable(const Warpgroup& warpgroup) {
  const uint64_t next = warpgroup.executed - warpgroup.first;
  return next < warpgroup.operations.size() && warpgroup.operations[next].issued == 128;
}

void wgmma_fence() {
  current->wgmma.needs_fence = false;
  ++current->wgmma.fences;
}

void wgmma_commit() { current->wgmma.commits.push_back(current->wgmma.issued); }

void issue_product(Element element, int columns, bool a_is_mn_major, bool b_is_mn_major, float* d, uint64_t a,
                   const uint32_t* registers, uint64_t b, bool accumulate) {
  Thread& thread = *current;
  const size_t group = static_cast<size_t>(thread.number / 128);
  if (group >= thread.block->warpgroups.size()) fail("wgmma by a thread of no whole warpgroup");
  Warpgroup& warpgroup = *thread.block->warpgroups[group];
  const int t = thread.number % 128;
  const uint64_t number = thread.wgmma.issued++;
  Accumulator* mine = find_accumulator(warpgroup, t, d);
  if (checks() && !mine && thread.wgmma.needs_fence) {
    fail("wgmma without a wgmma_fence since ordinary code could write its accumulator");
  }
  if (number < warpgroup.first || number - warpgroup.first > warpgroup.operations.size()) {
    fail("the threads of a warpgroup have issued different products");
  }
  if (number - warpgroup.first == warpgroup.operations.size()) {
    if (!mine) {
      warpgroup.accumulators.push_back(std::make_unique<Accumulator>());
      mine = warpgroup.accumulators.back().get();
      mine->columns = columns;
      mine->values.resize(static_cast<size_t>(64 * columns));
    }
    WgmmaOperation operation{};
    operation.element = element;
    operation.columns = columns;
    operation.a_is_mn_major = a_is_mn_major;
    operation.b_is_mn_major = b_is_mn_major;
    operation.a = a;
    operation.b = b;
    operation.accumulate = accumulate;
    operation.accumulator = mine;
    if (registers) operation.a_values = std::make_unique<std::array<float, 64 * 16>>();
    warpgroup.operations.push_back(std::move(operation));
  }
  WgmmaOperation& operation = operation_at(warpgroup, number);
  if (operation.a != a || operation.b != b || operation.columns != columns || operation.accumulate != accumulate ||
      operation.element != element || operation.a_is_mn_major != a_is_mn_major ||
      operation.b_is_mn_major != b_is_mn_major || (operation.a_values != nullptr) != (registers != nullptr)) {
    fail("the operands of a wgmma differ between the threads of the warpgroup: descriptors ", hex(operation.a), " and ",
         hex(a), ", ", hex(operation.b), " and ", hex(b), ", accumulate ", operation.accumulate, " and ", accumulate);
  }
  Accumulator& accumulator = *operation.accumulator;
  if (mine && mine != &accumulator) fail("the threads of a warpgroup issue a wgmma on different accumulators");
  if (accumulator.columns != columns) {
    fail("wgmma of ", columns, " columns on registers in flight of ", accumulator.columns);
  }
  if (!accumulator.registers[t]) take_registers(accumulator, t, d);
  accumulator.last[t] = number;
  // PTX ISA, figure of the fragment of a: as that of a d of 16 columns, two elements a register
  for (int i = 0; i < 8 && registers; ++i) {
    const Place at = place(t, i);
    const uint16_t bits = static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16);
    (*operation.a_values)[static_cast<size_t>(at.row * 16 + at.column)] = to_float(element, bits);
  }
  begin_reads(thread, warpgroup, operation, static_cast<uint32_t>(t / 32));
  ++operation.issued;
  if (!warpgroup.queued && executable(warpgroup)) {
    warpgroup.queued = true;
    engine->ready_warpgroups.push_back(&warpgroup);
  }
}

void wgmma(Element element, int columns, bool a_is_mn_major, bool b_is_mn_major, float* d, uint64_t a, uint64_t b,
           bool accumulate) {
  maybe_yield();
  issue_product(element, columns, a_is_mn_major, b_is_mn_major, d, a, nullptr, b, accumulate);
}

void wgmma_wait(int pending) {
  maybe_yield();
  Thread& thread = *current;
  const size_t group = static_cast<size_t>(thread.number / 128);
  if (group >= thread.block->warpgroups.size()) fail("wgmma_wait by a thread of no whole warpgroup");
  Warpgroup& warpgroup = *thread.block->warpgroups[group];
  const int t = thread.number % 128;
  WgmmaIssuer& issuer = thread.wgmma;
  while (static_cast<int>(issuer.commits.size()) > pending) {
    const uint64_t upto = issuer.commits.front();
    while (warpgroup.executed < upto) wait_in(warpgroup.waiting, {Waiting::kWgmma, upto, warpgroup.executed, nullptr});
    issuer.commits.erase(issuer.commits.begin());
    for (uint64_t number = issuer.retired; number < upto; ++number) {
      if (number >= warpgroup.first) {
        end_reads(thread, warpgroup, operation_at(warpgroup, number), static_cast<uint32_t>(t / 32));
      }
    }
    issuer.retired = std::max(issuer.retired, upto);
  }
  for (size_t i = 0; i < warpgroup.accumulators.size();) {
    Accumulator& accumulator = *warpgroup.accumulators[i];
    if (accumulator.registers[t] && accumulator.last[t] < issuer.retired) {
      give_registers(accumulator, t);
      issuer.needs_fence = true;
    }
    // other threads may still have to issue their part of a product on it
    const bool used = accumulator.threads > 0 ||
                      std::any_of(warpgroup.operations.begin(), warpgroup.operations.end(),
                                  [&](const auto& o) { return o.accumulator == &accumulator && o.issued < 128; });
    if (used) {
      ++i;
    } else {
      warpgroup.accumulators.erase(warpgroup.accumulators.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  while (!warpgroup.operations.empty() && warpgroup.first < warpgroup.executed &&
         warpgroup.operations.front().retired_warps == 0xf) {
    warpgroup.operations.pop_front();
    ++warpgroup.first;
  }
}

}  // namespace lorafuse::emu

// Matrix products of warpgroups that have been issued and not waited for.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "device.hpp"

namespace lorafuse::emu {

struct Thread;
struct Block;

// The registers of one accumulator, in all threads of the warpgroup, while products on it are in flight.
struct Accumulator {
  int columns;
  // [64][columns]
  std::vector<float> values;
  // Of each thread: where its registers are (null while they are its own), and the last product that it has issued.
  float* registers[128] = {};
  uint64_t last[128] = {};
  int threads = 0;
};

struct WgmmaOperation {
  Element element;
  int columns;
  bool a_is_mn_major, b_is_mn_major;
  uint64_t a, b;
  bool accumulate;
  Accumulator* accumulator;
  // [64][16], where a comes from registers: filled as the threads issue the product.
  std::unique_ptr<std::array<float, 64 * 16>> a_values;
  int issued = 0;
  // Warps whose reads are recorded, and whose wait has ended them.
  uint32_t checked_warps = 0, retired_warps = 0;
  // Lines of shared memory that b and each warp's rows of a lie in.
  std::vector<uint32_t> b_lines, a_lines[4];
};

struct Warpgroup {
  Block* block = nullptr;
  // The first has number `first`. Those below `executed` have happened; they are kept until all warps have waited.
  std::deque<WgmmaOperation> operations;
  uint64_t first = 0, executed = 0;
  bool queued = false;
  std::vector<std::unique_ptr<Accumulator>> accumulators;
  std::vector<Thread*> waiting;
};

// One thread's part.
struct WgmmaIssuer {
  uint64_t issued = 0;
  // Products up to here are known to be complete.
  uint64_t retired = 0;
  // The number of products at each commit that has not been waited for.
  std::vector<uint64_t> commits;
  // An accumulator's registers may have been written by ordinary code since the last fence.
  bool needs_fence = true;
  uint64_t fences = 0;

  void reset() {
    issued = retired = fences = 0;
    commits.clear();
    needs_fence = true;
  }
};

// A thread's part of a product. With `registers`, they are its part of a, and the descriptor of a means nothing.
void issue_product(Element element, int columns, bool a_is_mn_major, bool b_is_mn_major, float* d, uint64_t a,
                   const uint32_t* registers, uint64_t b, bool accumulate);
// The next product of the warpgroup happens.
void execute(Warpgroup& warpgroup);
// The first product that has not happened has been issued by all threads.
bool executable(const Warpgroup& warpgroup);

}  // namespace lorafuse::emu

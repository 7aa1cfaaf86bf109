// Work by ticket: a producer draws the number of what its cluster does next and passes it to all who take part.
//
// Numbers are drawn late, when the last loads of the work before are under way, so that no block holds one while others
// have nothing to do: a block that starts late, or shares its SM's time, leaves work to the others. They pass through two
// words with two mbarriers each, as a stage of the ring. Full: the word of each block, by the producer of the cluster's
// first block, which draws. Empty, in the first block: by the consumer warps of all blocks and the other producers.
//
// The counter is zero before and after a launch, without another launch: every cluster draws one number behind the last
// one, and who draws the very last zeroes it.
#pragma once

#include "pipeline_sm90.cuh"

namespace lorafuse::sm90 {

struct Tickets {
  static constexpr int kSlots = 2;
  static constexpr int kBytes = kSlots * (2 * 8 + 4);
  uint64_t* barriers;
  int cluster;
  int slot = 0;
  uint32_t parity = 0;

  LF_DEVICE explicit Tickets(uint8_t* memory, int cluster = 1)
      : barriers(reinterpret_cast<uint64_t*>(memory)), cluster(cluster) {}

  LF_DEVICE uint64_t* full() const { return barriers + slot; }
  LF_DEVICE uint64_t* empty() const { return barriers + kSlots + slot; }
  LF_DEVICE uint32_t* word() const { return reinterpret_cast<uint32_t*>(barriers + 2 * kSlots) + slot; }

  // One thread, in start_block. `warps` of each block take numbers.
  LF_DEVICE void initialize(int warps = 8) {
    for (int s = 0; s < kSlots; ++s) {
      ptx::mbarrier_init(barriers + s, 1);
      ptx::mbarrier_init(barriers + kSlots + s, warps * cluster + cluster - 1);
    }
  }
  LF_DEVICE void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }

  // Waits for the number in the slot.
  LF_DEVICE int read() const {
    ptx::mbarrier_wait(full(), parity);
    return static_cast<int>(ptx::load_shared<uint32_t>(word()));
  }
  // Producer of each block of a cluster: `number`, which the one of rank 0 has drawn, for all of them.
  LF_DEVICE int pass(int number, int rank = 0) {
    if (rank == 0) ptx::mbarrier_wait_cluster(empty(), parity ^ 1);
    ptx::mbarrier_arrive_expect(full(), sizeof(uint32_t));
    if (rank == 0) {
      LF_NO_UNROLL
      for (int block = 0; block < cluster; ++block) ptx::store_async(word(), block, number, full());
    } else {
      number = read();
      ptx::mbarrier_arrive_cluster(empty(), 0);
    }
    advance();
    return number;
  }
  // All lanes of a warp that works on it.
  LF_DEVICE int take(int lane) {
    const int number = read();
    ptx::warp_sync();
    if (lane == 0) ptx::mbarrier_arrive_cluster(empty(), 0);
    advance();
    return number;
  }
};

// Behind the shared memory of SharedPlan: the tickets.
template <int BLOCK_M, int BLOCK_N>
struct TicketPlan {
  using Plan = SharedPlan<BLOCK_M, BLOCK_N>;
  LF_HOST_DEVICE static constexpr int tickets(int stages) { return Plan::bytes(stages) - 1024; }
  LF_HOST_DEVICE static constexpr int bytes(int stages) { return 1024 + tickets(stages) + Tickets::kBytes; }
};

}  // namespace lorafuse::sm90

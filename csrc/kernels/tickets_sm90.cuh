// Work by ticket: a producer draws the number of what its block does next and passes it to the consumers.
//
// Numbers are drawn late, when the last loads of the work before are under way, so that no block holds one while others
// have nothing to do. They pass through two words with two mbarriers each, as a stage of the ring: full, by the
// producer; empty, by the 8 consumer warps.
#pragma once

#include "pipeline_sm90.cuh"

namespace lorafuse::sm90 {

// Numbers of tiles on their way from the producer to the consumers.
struct Tickets {
  static constexpr int kSlots = 2;
  static constexpr int kBytes = kSlots * (2 * 8 + 4);
  uint64_t* barriers;
  int slot = 0;
  uint32_t parity = 0;

  LF_DEVICE explicit Tickets(uint8_t* memory) : barriers(reinterpret_cast<uint64_t*>(memory)) {}

  LF_DEVICE uint64_t* full() const { return barriers + slot; }
  LF_DEVICE uint64_t* empty() const { return barriers + kSlots + slot; }
  LF_DEVICE uint32_t* word() const { return reinterpret_cast<uint32_t*>(barriers + 2 * kSlots) + slot; }

  // One thread, before a fence of mbarriers.
  LF_DEVICE void initialize() {
    for (int s = 0; s < kSlots; ++s) {
      ptx::mbarrier_init(barriers + s, 1);
      ptx::mbarrier_init(barriers + kSlots + s, 8);
    }
  }
  LF_DEVICE void advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }

  // Producer.
  LF_DEVICE void pass(int tile) {
    ptx::mbarrier_wait(empty(), parity ^ 1);
    ptx::store_shared(word(), static_cast<uint32_t>(tile));
    ptx::mbarrier_arrive(full());
    advance();
  }
  // Consumer, all lanes of a warp.
  LF_DEVICE int take(int lane) {
    ptx::mbarrier_wait(full(), parity);
    const uint32_t tile = ptx::load_shared<uint32_t>(word());
    ptx::warp_sync();
    if (lane == 0) ptx::mbarrier_arrive(empty());
    advance();
    return static_cast<int>(tile);
  }
};

}  // namespace lorafuse::sm90

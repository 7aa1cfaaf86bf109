// Barriers and votes, emulated.
#pragma once

#include <cstring>

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

inline uint32_t shared_address(const void* p) { return emu::shared_address(p); }

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emu::mbarrier_init(barrier, arrivals); }
inline void mbarrier_init_fence() { emu::mbarrier_init_fence(); }
inline void mbarrier_arrive(uint64_t* barrier) { emu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) { emu::mbarrier_arrive_cluster(barrier, rank); }
inline void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emu::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emu::mbarrier_wait(barrier, parity, false); }
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { emu::mbarrier_wait(barrier, parity, true); }

template <int kBarrier, int kThreads>
inline void named_barrier_sync() {
  static_assert(kBarrier > 0 && kBarrier < 16, "barrier 0 is that of the block");
  static_assert(kThreads % 32 == 0, "barriers count whole warps");
  emu::named_barrier_sync(kBarrier, kThreads);
}
inline void block_sync() { emu::block_sync(); }
inline void warp_sync() { emu::warp_sync(); }

inline bool elect_one() { return emu::elect_one(); }
template <class T>
inline T shuffled(T value, uint32_t lane, bool exclusive_or) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emu::shuffle(bits, lane, exclusive_or);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
template <class T>
inline T shuffle(T value, int lane) {
  return shuffled(value, static_cast<uint32_t>(lane), false);
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffled(value, static_cast<uint32_t>(mask), true);
}

inline uint32_t cluster_rank() { return emu::cluster_rank(); }
inline void cluster_sync() { emu::cluster_sync(); }
inline void store_async(uint32_t* word, uint32_t rank, uint32_t value, uint64_t* barrier) {
  emu::store_async(word, rank, value, barrier);
}

// ptxas' report says what these are worth.
template <int kRegisters>
inline void registers_decrease() {}
template <int kRegisters>
inline void registers_increase() {}

}  // namespace lorafuse::ptx

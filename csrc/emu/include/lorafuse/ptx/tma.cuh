// The tensor memory accelerator, emulated.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

using TensorMap = emu::TensorMap;

inline void tma_prefetch(const TensorMap*) {}
inline void tma_load(void* shared, const TensorMap* map, int x, int y, uint64_t* barrier) {
  emu::tma_load(shared, *map, x, y, 0, barrier);
}
inline void tma_load(void* shared, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
  emu::tma_load(shared, *map, x, y, z, barrier);
}
inline void tma_load_multicast(void* shared, const TensorMap* map, int x, int y, uint64_t* barrier, uint16_t blocks) {
  emu::tma_load(shared, *map, x, y, 0, barrier, blocks);
}
inline void tma_store(const TensorMap* map, const void* shared, int x, int y) { emu::tma_store(*map, shared, x, y); }
inline void tma_store_commit() { emu::tma_store_commit(); }
template <int kPending>
inline void tma_store_wait_read() {
  emu::tma_store_wait(kPending, true);
}
template <int kPending>
inline void tma_store_wait() {
  emu::tma_store_wait(kPending, false);
}

inline void fence_proxy_async() { emu::fence_proxy_async(false); }
inline void fence_proxy_async_shared() { emu::fence_proxy_async(true); }

}  // namespace lorafuse::ptx

// The tensor memory accelerator: boxes of a tensor map to shared memory and back, and the fences between proxies.
#pragma once

#include <cuda.h>

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

using TensorMap = CUtensorMap;

LF_DEVICE void tma_prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Coordinates are those of the box's first element, innermost first; what lies outside the tensor arrives as zero and
// counts as bytes all the same.
LF_DEVICE void tma_load(void* shared, const TensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}
LF_DEVICE void tma_load(void* shared, const TensorMap* map, int x, int y, int z, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
// The same box to the same place in every block of the cluster whose bit is set in `blocks`, each with its own barrier.
LF_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, int x, int y, uint64_t* barrier,
                                  uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
// Elements outside the tensor are not written.
LF_DEVICE void tma_store(const TensorMap* map, const void* shared, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
               "r"(shared_address(shared)), "r"(x), "r"(y)
               : "memory");
}
LF_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's groups still read shared memory.
template <int kPending>
LF_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until at most kPending of them are not complete.
template <int kPending>
LF_DEVICE void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Between ordinary accesses and those of TMA, to the same memory.
LF_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }
// The same for shared memory alone: before a store of what threads wrote.
LF_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace lorafuse::ptx

// Copies of mma.cuh that arrive at an mbarrier instead of being waited for by their thread (sm_80 and later).
#pragma once

#include <lorafuse/ptx/mma.cuh>

namespace lorafuse::ptx {

// When all copies of this thread so far have landed, it arrives at the barrier once: one of the arrivals that the
// barrier was initialized with. Whoever waits there then sees them as ordinary writes of shared memory, so that a
// fence_proxy_async_shared must follow the wait where wgmma or TMA reads them.
LF_DEVICE void copy_async_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

}  // namespace lorafuse::ptx

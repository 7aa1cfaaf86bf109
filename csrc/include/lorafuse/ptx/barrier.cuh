// Barriers and votes: mbarriers in shared memory, named barriers, warps, clusters; registers of a warpgroup.
#pragma once

#include <cstdio>

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

// Looks at a counter or a barrier after which a kernel of a debug build stops, with a message: 2^24 take seconds. In
// other builds 0, and kernels wait as long as it takes.
constexpr uint32_t kMostLooks = LORAFUSE_MOST_LOOKS;

LF_DEVICE void stop_after(uint32_t looks, const char* what, const void* where, uint32_t value) {
  if constexpr (kMostLooks > 0) {
    if (looks != kMostLooks) return;
    printf("lorafuse: thread %u of block %u has waited too long for %s at %p to be %u\n", threadIdx.x, blockIdx.x, what,
           where, value);
    __trap();
  }
}

LF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

LF_DEVICE void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Makes initialized barriers visible to the async proxy and to the cluster; a block or cluster barrier must follow.
LF_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

LF_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives at the same barrier of block `rank` of the cluster. It orders what this thread has waited for (wgmma, TMA),
// and not its stores: with .release.cluster each arrival would be a fence of the GPU's memory (MEMBAR.ALL.GPU in SASS,
// nvcc 13.0).
LF_DEVICE void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{.reg .b32 remote;\n"
      " mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
// Arrives and announces `bytes` that asynchronous copies will bring in this phase.
LF_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits until the phase of that parity is complete; the hardware sleeps within each look.
LF_DEVICE void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  if constexpr (kMostLooks > 0) {
    uint32_t complete = 0;
    for (uint32_t looks = 0; !complete; ++looks) {
      asm volatile(
          "{.reg .pred complete;\n"
          " mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
          " selp.u32 %0, 1, 0, complete;}"
          : "=r"(complete)
          : "r"(shared_address(barrier)), "r"(parity)
          : "memory");
      stop_after(looks, "the phase of the barrier", barrier, parity);
    }
  } else {
    asm volatile(
        "{.reg .pred complete;\n"
        "wait_%=:\n"
        " mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        " @!complete bra wait_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
  }
}
// The same for a barrier at which threads of other blocks of the cluster arrive, before TMA writes what they have read.
// Ordinary loads of what they stored would need .acquire.cluster, which invalidates L1 (CCTL.IVALL in SASS).
LF_DEVICE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

// Literals: with a barrier number known only at run time ptxas reserves all sixteen.
template <int kBarrier, int kThreads>
LF_DEVICE void named_barrier_sync() {
  static_assert(kBarrier > 0 && kBarrier < 16, "barrier 0 is that of the block");
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
LF_DEVICE void block_sync() { __syncthreads(); }
LF_DEVICE void warp_sync() { __syncwarp(); }

// One lane of a converged warp, the same at every call.
LF_DEVICE bool elect_one() {
  uint32_t elected;
  asm volatile("{.reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;}" : "=r"(elected));
  return elected != 0;
}
template <class T>
LF_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
LF_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

LF_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of the cluster; what was written before is visible after.
LF_DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes a word of block `rank` of the cluster and takes its 4 bytes from what the same block's barrier expects: who
// waits for that phase reads the word.
LF_DEVICE void store_async(uint32_t* word, uint32_t rank, uint32_t value, uint64_t* barrier) {
  asm volatile(
      "{.reg .b32 place, counted;\n"
      " mapa.shared::cluster.u32 place, %0, %2;\n"
      " mapa.shared::cluster.u32 counted, %1, %2;\n"
      " st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [place], %3, [counted];}" ::"r"(shared_address(word)),
      "r"(shared_address(barrier)), "r"(rank), "r"(value)
      : "memory");
}

template <int kRegisters>
LF_DEVICE void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
LF_DEVICE void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace lorafuse::ptx

// Global memory that other blocks read or write in the same launch, launches that depend on each other, stmatrix.
#pragma once

#include <nv/target>

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

// Adds, after everything that this thread has done and seen (release, device scope).
LF_DEVICE void add_release(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
LF_DEVICE void add_relaxed(uint32_t* counter, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
// The value before the addition.
LF_DEVICE uint32_t fetch_add_relaxed(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
LF_DEVICE uint32_t fetch_add_acquire_release(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
// Waits until the counter is at least `value`; what was released with it is visible then. It sleeps between two looks,
// up to 256 ns: many blocks wait for one line of L2, and those that will write it share its bandwidth.
LF_DEVICE void wait_at_least(const uint32_t* counter, uint32_t value) {
  for (uint32_t looks = 0;; ++looks) {
    uint32_t seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= value) return;
    stop_after(looks, "the counter", counter, value);
    __nanosleep(looks < 3 ? 32u << looks : 256u);
  }
}
LF_DEVICE void store_relaxed(uint32_t* counter, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

// Ordinary accesses to global memory, through wrappers so that the emulator sees them.
template <class T>
LF_DEVICE T load_global(const T* p) {
  return *p;
}
template <class T>
LF_DEVICE void store_global(T* p, T value) {
  *p = value;
}

// The same for shared memory.
template <class T>
LF_DEVICE T load_shared(const void* p) {
  return *static_cast<const T*>(p);
}
template <class T>
LF_DEVICE void store_shared(void* p, T value) {
  *static_cast<T*>(p) = value;
}

// Programmatic dependent launch: until the launch before this one is complete and its writes are visible; and: the
// next one may start. Without the launch attribute both do nothing.
LF_DEVICE void wait_for_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
LF_DEVICE void let_next_launch_start() {
  // kernels that serve older GPUs too call it, which have no such launches
  NV_IF_TARGET(NV_PROVIDES_SM_90, (asm volatile("griddepcontrol.launch_dependents;" ::: "memory");))
}

// Four 8x8 matrices of 16-bit elements to shared memory; lane l gives the address of row l % 8 of matrix l / 8, and
// holds of matrix i the elements 2 (l % 4) and the next of row l / 4 in values[i].
LF_DEVICE void stmatrix(void* row, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(v0),
               "r"(v1), "r"(v2), "r"(v3)
               : "memory");
}

}  // namespace lorafuse::ptx

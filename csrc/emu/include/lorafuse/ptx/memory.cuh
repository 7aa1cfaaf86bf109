// Global and shared memory that other threads read or write, launches that depend on each other, stmatrix: emulated.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

inline void add_release(uint32_t* counter, uint32_t value) { emu::fetch_add(counter, value, emu::Order::kRelease); }
inline void add_relaxed(uint32_t* counter, uint32_t value) { emu::fetch_add(counter, value, emu::Order::kRelaxed); }
inline uint32_t fetch_add_relaxed(uint32_t* counter, uint32_t value) {
  return emu::fetch_add(counter, value, emu::Order::kRelaxed);
}
inline uint32_t fetch_add_acquire_release(uint32_t* counter, uint32_t value) {
  return emu::fetch_add(counter, value, emu::Order::kAcquireRelease);
}
inline void wait_at_least(const uint32_t* counter, uint32_t value) { emu::wait_at_least(counter, value); }
inline void store_relaxed(uint32_t* counter, uint32_t value) { emu::store_relaxed(counter, value); }

template <class T>
inline T load_global(const T* p) {
  emu::global_read(p, sizeof(T), alignof(T));
  return *p;
}
template <class T>
inline void store_global(T* p, T value) {
  emu::global_write(p, sizeof(T), alignof(T));
  *p = value;
}
template <class T>
inline T load_shared(const void* p) {
  emu::shared_read(p, sizeof(T), alignof(T));
  return *static_cast<const T*>(p);
}
template <class T>
inline void store_shared(void* p, T value) {
  emu::shared_write(p, sizeof(T), alignof(T));
  *static_cast<T*>(p) = value;
}

inline void wait_for_previous_launch() { emu::wait_for_previous_launch(); }
inline void let_next_launch_start() {}

inline void stmatrix(void* row, uint32_t v0, uint32_t v1, uint32_t v2, uint32_t v3) {
  emu::stmatrix(row, {v0, v1, v2, v3});
}

}  // namespace lorafuse::ptx

// Copies that arrive at an mbarrier, emulated.
#pragma once

#include <lorafuse/ptx/mma.cuh>

namespace lorafuse::ptx {

inline void copy_async_arrive(uint64_t* barrier) { emu::copy_async_arrive(barrier); }

}  // namespace lorafuse::ptx

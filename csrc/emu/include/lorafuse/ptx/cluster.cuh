// Shared memory of the other blocks of a cluster, emulated.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::emu {

float load_cluster(const float* p, uint32_t rank);

}  // namespace lorafuse::emu

namespace lorafuse::ptx {

inline float load_cluster(const float* p, uint32_t rank) { return emu::load_cluster(p, rank); }

}  // namespace lorafuse::ptx

// Shared memory of the other blocks of a cluster.
#pragma once

#include <lorafuse/ptx/barrier.cuh>

namespace lorafuse::ptx {

// Reads a float of block `rank`, which a cluster_sync has made visible.
LF_DEVICE float load_cluster(const float* p, uint32_t rank) {
  float value;
  asm volatile(
      "{.reg .b32 remote;\n"
      " mapa.shared::cluster.u32 remote, %1, %2;\n"
      " ld.shared::cluster.f32 %0, [remote];}"
      : "=f"(value)
      : "r"(shared_address(p)), "r"(rank)
      : "memory");
  return value;
}

}  // namespace lorafuse::ptx

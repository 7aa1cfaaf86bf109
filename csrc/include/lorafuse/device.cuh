// Host: the current device of this thread. The emulator's file of this name has two that are alike.
#pragma once

#include <cuda_runtime.h>

#include <lorafuse/common.cuh>

namespace lorafuse {

inline int current_device() {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) throw std::runtime_error(std::string("cudaGetDevice: ") + cudaGetErrorString(status));
  return device;
}
inline void set_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  require(status == cudaSuccess, "device ", device, ": ", cudaGetErrorString(status));
}

}  // namespace lorafuse

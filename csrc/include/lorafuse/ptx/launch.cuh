// Host: how a kernel is launched and a tensor map made. The emulator's file of this name does both on a CPU.
#pragma once

#include <cuda_runtime.h>
#include <cudaTypedefs.h>

#include <map>
#include <mutex>
#include <utility>

#include <lorafuse/device.cuh>
#include <lorafuse/ptx/tma.cuh>
#include <lorafuse/tensor_map.cuh>

namespace lorafuse {

using Stream = cudaStream_t;

struct LaunchConfig {
  int grid;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
  // may start before the launch before it has ended (wait_for_previous_launch)
  bool overlap_previous = false;
};

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Lets launches of a kernel on the current device have so much shared memory. The driver keeps one limit for each kernel
// and device, and is told of it when it grows.
inline void allow_shared_memory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> limits;
  const std::lock_guard lock(mutex);
  int& limit = limits[{kernel, current_device()}];
  if (bytes <= limit) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  limit = bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Stream stream, const Arguments&... arguments) {
  if (config.shared_bytes > 48 * 1024) {
    allow_shared_memory(reinterpret_cast<const void*>(kernel), config.shared_bytes);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = dim3(config.grid);
  launch_config.blockDim = dim3(config.threads);
  launch_config.dynamicSmemBytes = config.shared_bytes;
  launch_config.stream = stream;
  launch_config.attrs = attributes;
  if (config.cluster > 1) {
    attributes[launch_config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[launch_config.numAttrs].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
    ++launch_config.numAttrs;
  }
  if (config.overlap_previous) {
    attributes[launch_config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[launch_config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++launch_config.numAttrs;
  }
  check_cuda(cudaLaunchKernelEx(&launch_config, kernel, static_cast<Parameters>(arguments)...), "cudaLaunchKernelEx");
}

inline int multiprocessors() {
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()),
             "cudaDeviceGetAttribute");
  return count;
}

// Bytes of shared memory that one block can have.
inline int shared_memory_limit() {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()),
             "cudaDeviceGetAttribute");
  return bytes;
}

// A row-major tensor of 16-bit elements, innermost size first: `sizes` elements, `strides` bytes of all dimensions but
// the first, boxes of `box` elements with the 128-byte swizzle (box[0] is then 64 elements). Throws with the values for
// what TMA cannot describe.
template <class T, int kDimensions>
ptx::TensorMap encode_tensor_map(const void* base, const int64_t (&sizes)[kDimensions],
                                 const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions]) {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess) throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  check_tensor_map(base, sizes, strides, box);
  cuuint64_t size[kDimensions], stride[kDimensions];
  cuuint32_t boxes[kDimensions], ones[kDimensions];
  for (int i = 0; i < kDimensions; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    ones[i] = 1;
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides[i - 1]);
  }
  ptx::TensorMap map;
  const auto type = std::is_same_v<T, BF16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult status = encode(&map, type, kDimensions, const_cast<void*>(base), size, stride, boxes, ones,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status));
  return map;
}

}  // namespace lorafuse

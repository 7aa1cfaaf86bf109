// What csrc/include/lorafuse/ptx/launch.cuh calls of CUDA, with a driver that counts: two devices that are alike, each
// with its own limits of shared memory. As with CUDA's, the current device is a thread's own.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace fake {
constexpr int kDevices = 2, kMostShared = 232448;
inline thread_local int device = 0;
inline std::mutex mutex;
// of a kernel on a device
inline std::map<std::pair<const void*, int>, int> limits;
inline std::atomic<int> set_attributes, encoded, refused_launches;
}  // namespace fake

inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = fake::device;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= fake::kDevices) return cudaErrorInvalidValue;
  fake::device = device;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = fake::kMostShared;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > fake::kMostShared) return cudaErrorInvalidValue;
  const std::lock_guard lock(fake::mutex);
  fake::limits[{kernel, fake::device}] = value;
  ++fake::set_attributes;
  return cudaSuccess;
}
// Refuses more shared memory than the kernel's limit on the current device, as CUDA does.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&...) {
  const std::lock_guard lock(fake::mutex);
  const auto limit = fake::limits.find({reinterpret_cast<const void*>(kernel), fake::device});
  const size_t most = limit == fake::limits.end() ? 48 * 1024 : static_cast<size_t>(limit->second);
  if (config->dynamicSmemBytes <= most) return cudaSuccess;
  ++fake::refused_launches;
  return cudaErrorInvalidValue;
}

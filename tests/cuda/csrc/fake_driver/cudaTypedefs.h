// cuTensorMapEncodeTiled of the fake driver: it writes what it was given, and the device that was current.
#pragma once

#include <cuda_runtime.h>

#include <lorafuse/ptx/tma.cuh>

using CUresult = int;
using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
constexpr CUresult CUDA_SUCCESS = 0;
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum { CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };

using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(lorafuse::ptx::TensorMap*, CUtensorMapDataType, uint32_t, void*,
                                                       const uint64_t*, const uint64_t*, const uint32_t*,
                                                       const uint32_t*, int, int, int, int);

namespace fake {
inline CUresult encode(lorafuse::ptx::TensorMap* map, CUtensorMapDataType type, uint32_t dimensions, void* base,
                       const uint64_t* sizes, const uint64_t* strides, const uint32_t* box, const uint32_t*, int, int,
                       int, int) {
  *map = {};
  map->device = device;
  map->type = type;
  map->dimensions = static_cast<int>(dimensions);
  map->base = base;
  for (uint32_t i = 0; i < dimensions; ++i) {
    map->sizes[i] = static_cast<int64_t>(sizes[i]);
    map->box[i] = static_cast<int>(box[i]);
    if (i + 1 < dimensions) map->strides[i] = static_cast<int64_t>(strides[i]);
  }
  ++encoded;
  return CUDA_SUCCESS;
}
}  // namespace fake

inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, int, int,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = reinterpret_cast<void*>(&fake::encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

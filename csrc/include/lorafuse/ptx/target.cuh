// How functions are marked for nvcc. The emulator's file of this name marks them for g++.
#pragma once

#define LF_DEVICE __device__ __forceinline__
#define LF_HOST_DEVICE __host__ __device__ __forceinline__
// A kernel of `threads` threads, one block an SM.
#define LF_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
// A kernel of `threads` threads, at least `blocks` of them an SM.
#define LF_KERNEL_SHARED(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// Parameters that TMA reads in place.
#define LF_GRID_CONSTANT const __grid_constant__
// Dynamic shared memory, as a byte pointer named `name`; aligned to 16 bytes only.
#define LF_DYNAMIC_SHARED(name) extern __shared__ __align__(16) uint8_t name[]
#define LF_UNROLL _Pragma("unroll")
#define LF_NO_UNROLL _Pragma("unroll 1")

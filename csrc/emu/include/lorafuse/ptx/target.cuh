// How functions are marked for g++, and what a kernel finds around it. See csrc/include for nvcc's file of this name.
#pragma once

#include "../../../device.hpp"

#define LF_DEVICE inline
#define LF_HOST_DEVICE inline
#define LF_KERNEL(threads) inline void
#define LF_KERNEL_SHARED(threads, blocks) inline void
#define LF_GRID_CONSTANT const
#define LF_DYNAMIC_SHARED(name) uint8_t* const name = ::lorafuse::emu::dynamic_shared()
#define LF_UNROLL
#define LF_NO_UNROLL
// Whether the bug of this name is on: in the emulator's own tests, whose kernels exist for their bugs, and in copies of the
// product's kernels that a build for tests makes (tests/planted.py).
#define LF_PLANTED(name) ::lorafuse::emu::planted(name)

#define threadIdx (::lorafuse::emu::thread_index())
#define blockIdx (::lorafuse::emu::block_index())
#define blockDim (::lorafuse::emu::block_dimensions())
#define gridDim (::lorafuse::emu::grid_dimensions())

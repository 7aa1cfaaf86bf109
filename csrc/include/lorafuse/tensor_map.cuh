// Host: what a tensor map can describe. The one statement of it, for the driver's encoder and for the emulator's.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

// Throws, with the value and the rule, for a tensor of 16-bit elements that TMA cannot read in boxes of `box` elements
// with the 128-byte swizzle (CUDA driver API, cuTensorMapEncodeTiled).
template <int kDimensions>
void check_tensor_map(const void* base, const int64_t (&sizes)[kDimensions], const int64_t (&strides)[kDimensions - 1],
                      const int (&box)[kDimensions]) {
  require(reinterpret_cast<uintptr_t>(base) % 16 == 0, "address ", base, " is not on a 16-byte boundary, as TMA needs");
  for (int i = 0; i < kDimensions; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= (int64_t{1} << 32), "size ", sizes[i], " of dimension ", i,
            " is not in 1 … 2^32, as TMA needs");
    require(box[i] >= 1 && box[i] <= 256, "box of ", box[i], " elements is not in 1 … 256, as TMA needs");
  }
  for (int i = 0; i + 1 < kDimensions; ++i) {
    require(strides[i] >= 16 && strides[i] % 16 == 0 && strides[i] < (int64_t{1} << 40), "stride of ", strides[i],
            " bytes is not a multiple of 16 below 2^40, as TMA needs");
  }
  require(box[0] * 2 <= 128, "box of ", box[0], " elements is wider than the 128-byte swizzle");
}

}  // namespace lorafuse

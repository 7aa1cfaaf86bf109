// A tensor map of the fake driver: what it was made of.
#pragma once

#include <cstdint>

namespace lorafuse::ptx {

struct TensorMap {
  int device, type, dimensions;
  const void* base;
  int64_t sizes[3], strides[2];
  int box[3];
};

}  // namespace lorafuse::ptx

// Host: what every sm_90 kernel asks of sizes and matrices.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse::sm90 {

inline void check_size(const char* name, int64_t size) {
  require(size >= 0 && size < int64_t{1} << 31, name, " of ", size, " is not in 0 … 2^31 - 1");
}
inline void check_address(const char* name, const void* base, int boundary) {
  require(base != nullptr, name, " is null");
  require(reinterpret_cast<uintptr_t>(base) % boundary == 0, name, " at ", base, " is not on a ", boundary,
          "-byte boundary");
}
// Rows of a matrix begin on 16-byte boundaries, or TMA cannot read them.
inline void check_matrix(const char* name, const void* base, int64_t columns, int64_t stride) {
  check_address(name, base, 16);
  require(stride >= columns, name, " has a stride of ", stride, " elements for rows of ", columns);
  require(stride % 8 == 0, name, " has a stride of ", stride, " elements, which is not a multiple of 8 (16 bytes)");
}

}  // namespace lorafuse::sm90

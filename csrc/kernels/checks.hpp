// Host: what every kernel requires of sizes, types and matrices.
#pragma once

#include <lorafuse/api.hpp>
#include <lorafuse/common.cuh>

namespace lorafuse {

inline void check_size(const char* name, int64_t size) {
  require(size >= 0 && size < int64_t{1} << 31, name, " of ", size, " is not in 0 … 2^31 - 1");
}
inline void check_address(const char* name, const void* base, int boundary) {
  require(base != nullptr, name, " is null");
  require(reinterpret_cast<uintptr_t>(base) % boundary == 0, name, " at ", base, " is not on a ", boundary,
          "-byte boundary");
}
inline void check_stride(const char* name, int64_t columns, int64_t stride) {
  require(stride >= columns, "stride ", stride, " of ", name, " is below its ", columns, " columns");
}
// Rows of a matrix begin on 16-byte boundaries: TMA reads no others, and copies move pieces of 16 bytes.
inline void check_matrix(const char* name, const void* base, int64_t columns, int64_t stride, int element_bytes = 2) {
  check_address(name, base, 16);
  check_stride(name, columns, stride);
  require(stride * element_bytes % 16 == 0, "stride ", stride, " of ", name, " is not a multiple of ",
          16 / element_bytes, " elements (16 bytes)");
}
// Adapters and their gradients are fp32 or of x's type.
inline void check_adapter_type(Type type, Type x_type) {
  require(type == Type::FP32 || type == x_type, "adapter's type ", static_cast<int>(type),
          " is neither FP32 nor that of x, ", static_cast<int>(x_type));
}

}  // namespace lorafuse

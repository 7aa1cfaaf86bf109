// What the bindings call to decode quantized weights, as api.hpp: apart from it, since products include that.
//
// sm_80 and later. `type` of out is BF16, FP16 or FP32; `rounded` is the type to which a library rounds first where it
// is another one, FP32 for none.
#pragma once

#include <lorafuse/api.hpp>

namespace lorafuse {

// A power of two in a byte, of scales alone.
inline constexpr Type kE8M0{3};

// out[i - first] = code[q[i]] · absmax[i / block_size] for `count` values from `first` on, in the order of memory, so
// that blocks cross rows; two a byte, the even one in the high half. block_size is a power of two, at least 32. Nested:
// absmax is nested_code[byte of absmax] · nested_absmax[block / 256] + nested_offset, rounded twice.
struct DecodeCodebook {
  Type type;
  int64_t count;
  int64_t first = 0;
  int block_size;
  const void* data;
  const float* code;   // [16]
  const void* absmax;  // [blocks], fp32, or bytes where nested
  const float* nested_code = nullptr;    // [256]
  const float* nested_absmax = nullptr;  // [ceil(blocks / 256)]
  const float* nested_offset = nullptr;  // [1]
  Type rounded = Type::FP32;
  void* out;
};
void decode_codebook(const DecodeCodebook& p, void* stream);

// out = data · scale: e4m3 [G, N, K], one scale for each block_rows x block_columns of a matrix,
// [G, ceil(N / block_rows), ceil(K / block_columns)]. `rounded_scale` is the type to which the scale is rounded before
// the product.
struct DecodeFp8 {
  Type type;
  int64_t G = 1;
  int64_t N, K;
  int64_t block_rows, block_columns;
  const void* data;
  const void* scale;
  Type scale_type = Type::FP32;  // FP32, BF16 or kE8M0
  Type rounded_scale = Type::FP32;
  Type rounded = Type::FP32;
  void* out;
};
void decode_fp8(const DecodeFp8& p, void* stream);

}  // namespace lorafuse

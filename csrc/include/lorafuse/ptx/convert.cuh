// Elements of 16 bits and fp32.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

// Two floats rounded to nearest even, `low` in the low half.
template <class T>
LF_DEVICE uint32_t pack(float low, float high);
template <>
LF_DEVICE uint32_t pack<BF16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
template <>
LF_DEVICE uint32_t pack<FP16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The element in the low half of `packed`; shift right by 16 for the other.
template <class T>
LF_DEVICE float unpack(uint32_t packed);
template <>
LF_DEVICE float unpack<BF16>(uint32_t packed) {
  return __uint_as_float(packed << 16);
}
template <>
LF_DEVICE float unpack<FP16>(uint32_t packed) {
  float value;
  asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(value) : "r"(packed));
  return value;
}

template <class T>
LF_DEVICE float to_float(T element) {
  return unpack<T>(element.bits);
}
LF_DEVICE float to_float(float element) { return element; }

template <class T>
LF_DEVICE T from_float(float value) {
  return T{static_cast<uint16_t>(pack<T>(value, 0.0f))};
}
template <>
LF_DEVICE float from_float<float>(float value) {
  return value;
}

LF_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace lorafuse::ptx

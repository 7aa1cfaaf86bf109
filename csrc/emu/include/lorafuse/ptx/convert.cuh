// Elements of 16 bits and fp32, emulated.
#pragma once

#include <lorafuse/common.cuh>

#include "../../../numbers.hpp"

namespace lorafuse::ptx {

template <class T>
inline constexpr emu::Element kElement = T::not_an_element;
template <>
inline constexpr emu::Element kElement<BF16> = emu::Element::kBF16;
template <>
inline constexpr emu::Element kElement<FP16> = emu::Element::kFP16;

template <class T>
inline uint32_t pack(float low, float high) {
  const uint32_t low_bits = emu::to_bits(kElement<T>, low), high_bits = emu::to_bits(kElement<T>, high);
  return high_bits << 16 | low_bits;
}
template <class T>
inline float unpack(uint32_t packed) {
  return emu::to_float(kElement<T>, static_cast<uint16_t>(packed));
}

template <class T>
inline float to_float(T element) {
  return unpack<T>(element.bits);
}
inline float to_float(float element) { return element; }

template <class T>
inline T from_float(float value) {
  return T{emu::to_bits(kElement<T>, value)};
}
template <>
inline float from_float<float>(float value) {
  return value;
}

inline uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

}  // namespace lorafuse::ptx

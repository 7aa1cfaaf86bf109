// What every file of csrc shares: the two ways a function is compiled, element types, small arithmetic, checks.
//
// A kernel is compiled twice from one source: by nvcc, with the wrappers of include/lorafuse/ptx, and by g++, with those
// of emu/include/lorafuse/ptx, which come first on that build's include path. Kernels hold no inline PTX, no spin loop
// and no CUDA intrinsic of their own.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include <lorafuse/ptx/target.cuh>

namespace lorafuse {

// Storage of a 16-bit element; arithmetic is in the wrappers of ptx/convert.cuh.
struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

template <class T>
LF_HOST_DEVICE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

template <class T>
LF_HOST_DEVICE constexpr T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

// Host: raises with what was found and the rule. Bindings turn it into a ValueError.
template <class... Parts>
inline void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());
}

}  // namespace lorafuse

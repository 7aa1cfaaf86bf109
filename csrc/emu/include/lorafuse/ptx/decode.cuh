// Accesses of 16 bytes, and products that are rounded, emulated.
#pragma once

#include <cstring>

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

inline void load_words_once(uint32_t (&words)[4], const void* p) {
  emu::global_read(p, 16, 16);
  std::memcpy(words, p, 16);
}
template <class T>
inline void store_words(void* p, const T (&words)[4]) {
  static_assert(sizeof(words) == 16);
  emu::global_write(p, 16, 16);
  std::memcpy(p, words, 16);
}

// g++ makes no FMA without -mfma
inline float multiply_rounded(float a, float b) { return a * b; }

}  // namespace lorafuse::ptx

// What decoding needs beyond memory.cuh and convert.cuh, which products include.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

// 16 bytes that are read once: the first to leave the caches.
LF_DEVICE void load_words_once(uint32_t (&words)[4], const void* p) {
  const uint4 loaded = __ldcs(static_cast<const uint4*>(p));
  words[0] = loaded.x, words[1] = loaded.y, words[2] = loaded.z, words[3] = loaded.w;
}
// 16 bytes in one store. nvcc 13.0 makes four of an assignment of packed words, vector type or not.
LF_DEVICE void store_words(void* p, const uint32_t (&words)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}
LF_DEVICE void store_words(void* p, const float (&words)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(words[0]), "f"(words[1]), "f"(words[2]),
               "f"(words[3])
               : "memory");
}

// A product that is rounded before a sum takes it in: no FMA.
LF_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

}  // namespace lorafuse::ptx

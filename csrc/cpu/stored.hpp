// What codes of a quantized weight stand for: value(code i) * scale[i / block], of int8 times a constant, all fp32. A scale
// is a number, or that of a byte in a table; of nested statistics this times outer[j / 256], plus an offset. Each product
// and sum is rounded once (compiled with -ffp-contract=off), so that the bits are those of the codecs in lorafuse/formats.

#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#define LORAFUSE_AVX2 __attribute__((target("avx2")))
#endif

namespace lorafuse {

inline constexpr int64_t kNestedBlock = 256;

struct Scales {
  // either fp32, or bytes with their table, and of nested statistics the two after it
  const float* plain;
  const uint8_t* coded;
  const float* table;
  const float* outer;
  const float* offset;

  float operator[](int64_t j) const {
    if (plain) return plain[j];
    const float value = table[coded[j]];
    return outer ? value * outer[j / kNestedBlock] + *offset : value;
  }
};

// 4 bits an element, two in a byte, and what they stand for
template <bool kLowFirst>
struct Nibbles {
  const uint8_t* code;
  const float* table;

  float value(int64_t i, float scale) const {
    return table[(i % 2 == 0) == kLowFirst ? code[i / 2] & 15 : code[i / 2] >> 4] * scale;
  }
};

// 8 bits an element, and what they stand for
struct Bytes {
  const uint8_t* code;
  const float* table;

  float value(int64_t i, float scale) const { return table[code[i]] * scale; }
};

struct Integers {
  const int8_t* code;
  float step;

  float value(int64_t i, float scale) const { return float(code[i]) * scale * step; }
};

// elements start ... stop - 1, which one block holds; `to` is where element `start` goes
template <class Codec>
void decode_part(const Codec& w, float scale, int64_t start, int64_t stop, float* to) {
  for (int64_t i = start; i < stop; ++i) *to++ = w.value(i, scale);
}

#if defined(__x86_64__)
template <class Codec>
LORAFUSE_AVX2 void decode_part_avx2(const Codec& w, float scale, int64_t start, int64_t stop, float* to) {
  // a copy, which no store to `to` can change: the compiler makes vectors of it
  const Codec own = w;
  for (int64_t i = 0; i < stop - start; ++i) to[i] = own.value(start + i, scale);
}

template <bool kLowFirst>
LORAFUSE_AVX2 void decode_part_avx2(
    const Nibbles<kLowFirst>& w, float scale, int64_t start, int64_t stop, float* to) {
  if (start % 2 && start < stop) *to++ = w.value(start++, scale);
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(w.table), factor);
  const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(w.table + 8), factor);
  const __m128i nibble = _mm_set1_epi8(15);
  for (; start + 16 <= stop; start += 16, to += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.code + start / 2));
    const __m128i upper = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), lower = _mm_and_si128(bytes, nibble);
    const __m128i index = kLowFirst ? _mm_unpacklo_epi8(lower, upper) : _mm_unpacklo_epi8(upper, lower);
    for (int half = 0; half < 2; ++half) {
      const __m256i i = _mm256_cvtepu8_epi32(half ? _mm_srli_si128(index, 8) : index);
      // the table is looked up by the lower three bits, the fourth becomes the sign that chooses
      const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
      const __m256 values =
          _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), is_high);
      _mm256_storeu_ps(to + 8 * half, values);
    }
  }
  decode_part(w, scale, start, stop, to);
}
#endif

// A weight as it is stored; either `plain` or `coded` scales are there.
struct Stored {
  // nibbles of a table of 16, the high one of a byte first (0) or the low one (1); bytes of a table of 256 (2); int8 (3),
  // which alone has a `step`
  int kind;
  float step;
  const void* code;
  const float* table;
  Scales scales;
  int64_t block;

  // elements start ... stop - 1 of the flat weight, to `to`
  void decode(int64_t start, int64_t stop, float* to) const {
    const auto* bytes = static_cast<const uint8_t*>(code);
    if (kind == 0) decode_by(Nibbles<false>{bytes, table}, start, stop, to);
    if (kind == 1) decode_by(Nibbles<true>{bytes, table}, start, stop, to);
    if (kind == 2) decode_by(Bytes{bytes, table}, start, stop, to);
    if (kind == 3) decode_by(Integers{static_cast<const int8_t*>(code), step}, start, stop, to);
  }

 private:
  template <class Codec>
  void decode_by(const Codec& w, int64_t start, int64_t stop, float* to) const {
    auto part = decode_part<Codec>;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) {
      part = [](const Codec& c, float scale, int64_t first, int64_t end, float* out) {
        decode_part_avx2(c, scale, first, end, out);
      };
    }
#endif
    while (start < stop) {
      const int64_t end = std::min(stop, (start / block + 1) * block);
      part(w, scales[start / block], start, end, to);
      to += end - start;
      start = end;
    }
  }
};

}  // namespace lorafuse

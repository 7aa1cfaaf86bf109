// Decodes 4-bit weights on a CPU: out[i] = table[nibble i] * scale[i / block], all fp32, the high nibble of a byte first.
// A scale is absmax[j], or of nested statistics outer_table[absmax[j]] * outer[j / 256] + offset. Each product and sum is
// rounded once (compiled with -ffp-contract=off), so that the bits are those of lorafuse/formats/bnb_4bit.py. One pass:
// half a byte read and four written an element. Functions have C names and plain arguments: ctypes calls them.

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kNestedBlock = 256;
// of a thread at a time: the fp32 values are 64 KiB
constexpr int64_t kChunk = 16384;

struct Weight {
  const uint8_t* code;
  const float* table;
  // either fp32, or bytes with the three after them
  const float* absmax;
  const uint8_t* nested;
  const float* outer;
  const float* outer_table;
  const float* offset;
  int64_t block;

  float scale(int64_t j) const {
    return nested ? outer_table[nested[j]] * outer[j / kNestedBlock] + *offset : absmax[j];
  }

  float value(int64_t i, float scale) const { return table[i % 2 ? code[i / 2] & 15 : code[i / 2] >> 4] * scale; }
};

// elements start ... stop - 1, which one block holds; `to` is where element `start` goes
void decode_part(const Weight& w, float scale, int64_t start, int64_t stop, float* to) {
  for (int64_t i = start; i < stop; ++i) *to++ = w.value(i, scale);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void decode_part_avx2(
    const Weight& w, float scale, int64_t start, int64_t stop, float* to) {
  if (start % 2 && start < stop) *to++ = w.value(start++, scale);
  const __m256 factor = _mm256_set1_ps(scale);
  const __m256 low = _mm256_mul_ps(_mm256_loadu_ps(w.table), factor);
  const __m256 high = _mm256_mul_ps(_mm256_loadu_ps(w.table + 8), factor);
  const __m128i nibble = _mm_set1_epi8(15);
  for (; start + 16 <= stop; start += 16, to += 16) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.code + start / 2));
    const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), second = _mm_and_si128(bytes, nibble);
    const __m128i index = _mm_unpacklo_epi8(first, second);
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

}  // namespace

extern "C" {

// of the functions below, which their caller expects
__attribute__((visibility("default"))) int lorafuse_cpu_version() { return 1; }

// Elements first ... first + count - 1 of the flat weight, to `out`; nested, outer, outer_table and offset are null for
// an absmax in fp32, which is null otherwise.
__attribute__((visibility("default"))) void lorafuse_decode_4bit(
    const uint8_t* code, const float* table, const float* absmax, const uint8_t* nested, const float* outer,
    const float* outer_table, const float* offset, int64_t block, int64_t first, int64_t count, int threads, float* out) {
  const Weight w{code, table, absmax, nested, outer, outer_table, offset, block};
  auto part = decode_part;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) part = decode_part_avx2;
#endif
  const int64_t chunks = (count + kChunk - 1) / kChunk;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && chunks > 1)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t stop = first + std::min(count, (chunk + 1) * kChunk);
    for (int64_t start = first + chunk * kChunk; start < stop;) {
      const int64_t end = std::min(stop, (start / block + 1) * block);
      part(w, w.scale(start / block), start, end, out + (start - first));
      start = end;
    }
  }
}

}

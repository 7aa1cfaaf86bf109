// Decodes quantized weights on a CPU, in one pass: codes are read and four bytes an element written. Functions have C
// names and plain arguments: ctypes calls them.

#include "stored.hpp"
#include "threads.hpp"

// of a thread at a time: the fp32 values are 64 KiB
static constexpr int64_t kChunk = 16384;

extern "C" {

// of this module's functions, which their caller expects
__attribute__((visibility("default"))) int lorafuse_cpu_version() { return 6; }

// Elements first ... first + count - 1 of the flat weight, to `out`.
__attribute__((visibility("default"))) void lorafuse_decode(
    const lorafuse::Stored* w, int64_t first, int64_t count, int threads, float* out) {
  lorafuse::parallel(threads, (count + kChunk - 1) / kChunk, [&](int64_t chunk) {
    const int64_t start = chunk * kChunk;
    w->decode(first + start, first + std::min(count, start + kChunk), out + start);
  });
}
}

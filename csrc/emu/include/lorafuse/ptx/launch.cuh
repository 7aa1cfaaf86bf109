// Host: how a kernel is launched and a tensor map made, emulated.
#pragma once

#include <type_traits>

#include <lorafuse/ptx/tma.cuh>
#include <lorafuse/tensor_map.cuh>

namespace lorafuse {

using Stream = void*;

struct LaunchConfig {
  int grid;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;
  // may start before the launch before it has ended (wait_for_previous_launch)
  bool overlap_previous = false;
};

// Returns when the kernel has ended. Throws emu::Error.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, Stream, const Arguments&... arguments) {
  // every thread has parameters of its own, as its registers and constant bank would hold them
  emu::run_launch(config.grid, config.threads, config.shared_bytes, config.cluster, config.overlap_previous,
                  [&] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int multiprocessors() { return emu::multiprocessors(); }
inline int shared_memory_limit() { return emu::shared_memory_limit(); }

// The device's maps have the 128-byte swizzle.
template <class T, int kDimensions>
ptx::TensorMap encode_tensor_map(const void* base, const int64_t (&sizes)[kDimensions],
                                 const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions],
                                 emu::Swizzle swizzle = emu::Swizzle::k128) {
  static_assert(sizeof(T) == 2 && (kDimensions == 2 || kDimensions == 3));
  const bool plain = swizzle == emu::Swizzle::kNone;
  const int row_bytes = box[0] * 2, span = plain ? 128 : static_cast<int>(swizzle);
  require(row_bytes <= span, "box of ", box[0], " elements is wider than the ", span, " bytes ",
          plain ? "that the emulator models of a row" : "of its swizzle");
  check_tensor_map(base, sizes, strides, box);
  require(row_bytes % 16 == 0, "box of ", box[0], " elements is not a multiple of 16 bytes, as TMA needs");
  require(plain || row_bytes == span, "box of ", box[0], " elements is narrower than the ", span,
          "-byte swizzle, and how TMA lays out such rows is not documented");
  int bytes = row_bytes;
  for (int i = 1; i < kDimensions; ++i) bytes *= box[i];
  require(bytes % 128 == 0, "box of ", bytes, " bytes: the emulator models whole lines of 128");
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.dimensions = kDimensions;
  map.swizzle = swizzle;
  map.base = static_cast<const uint8_t*>(base);
  for (int i = 0; i < 3; ++i) {
    map.sizes[i] = i < kDimensions ? sizes[i] : 1;
    map.box[i] = i < kDimensions ? box[i] : 1;
    if (i + 1 < kDimensions) map.strides[i] = strides[i];
  }
  return map;
}

}  // namespace lorafuse

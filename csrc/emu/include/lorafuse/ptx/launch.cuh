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

template <class T, int kDimensions>
ptx::TensorMap encode_tensor_map(const void* base, const int64_t (&sizes)[kDimensions],
                                 const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions]) {
  static_assert(sizeof(T) == 2 && (kDimensions == 2 || kDimensions == 3));
  check_tensor_map(base, sizes, strides, box);
  require(box[0] == 64, "box of ", box[0], " elements: the emulator knows rows of 128 bytes only");
  ptx::TensorMap map{};
  map.magic = ptx::TensorMap::kMagic;
  map.dimensions = kDimensions;
  map.base = static_cast<const uint8_t*>(base);
  for (int i = 0; i < 3; ++i) {
    map.sizes[i] = i < kDimensions ? sizes[i] : 1;
    map.box[i] = i < kDimensions ? box[i] : 1;
    if (i + 1 < kDimensions) map.strides[i] = strides[i];
  }
  return map;
}

}  // namespace lorafuse

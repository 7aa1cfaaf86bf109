// Host: tensor maps that are kept, so that a launch encodes none that an earlier one had.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include <lorafuse/cache.cuh>
#include <lorafuse/device.cuh>
#include <lorafuse/ptx/launch.cuh>

namespace lorafuse {

// A launch has 3 to 9, and a step of a large model some thousands.
constexpr size_t kMostMaps = 4096;

// encode_tensor_map's of these arguments on the current device. A map is an address and sizes: it stays true of whatever
// an allocator puts there next.
template <class T, int kDimensions>
ptx::TensorMap tensor_map(const void* base, const int64_t (&sizes)[kDimensions],
                          const int64_t (&strides)[kDimensions - 1], const int (&box)[kDimensions]) {
  constexpr int kFirst = 3;
  using Maps = Cache<ptx::TensorMap, kFirst + 3 * kDimensions - 1>;
  static Maps maps(kMostMaps);
  typename Maps::Key key{reinterpret_cast<uintptr_t>(base), static_cast<uint64_t>(current_device()),
                         std::is_same_v<T, BF16>};
  auto next = std::copy(std::begin(sizes), std::end(sizes), key.begin() + kFirst);
  next = std::copy(std::begin(strides), std::end(strides), next);
  std::copy(std::begin(box), std::end(box), next);
  return maps.get(key, [&] { return encode_tensor_map<T>(base, sizes, strides, box); });
}

}  // namespace lorafuse

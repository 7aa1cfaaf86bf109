// Host: the current device of this thread, emulated: there are two, and nothing but their number tells them apart.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

constexpr int kDevices = 2;

inline int& device_of_thread() {
  static thread_local int device = 0;
  return device;
}
inline int current_device() { return device_of_thread(); }
inline void set_device(int device) {
  require(device >= 0 && device < kDevices, "device ", device, ": there are ", kDevices);
  device_of_thread() = device;
}

}  // namespace lorafuse

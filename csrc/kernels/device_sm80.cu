// swap_device of api_device.hpp.
#include <lorafuse/api_device.hpp>
#include <lorafuse/device.cuh>

namespace lorafuse {

int swap_device(int device) {
  const int former = current_device();
  if (device != former) set_device(device);
  return former;
}

}  // namespace lorafuse

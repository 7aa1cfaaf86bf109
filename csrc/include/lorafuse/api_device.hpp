// The device that a launch is for, by its index: a module has a CUDA runtime of its own, which knows nothing of the
// device that another one made current.
#pragma once

namespace lorafuse {

// Makes a device current for this thread and returns the one that was. Throws for one that does not exist.
int swap_device(int device);

}  // namespace lorafuse

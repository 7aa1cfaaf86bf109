// The gathered kernels that activate, in a file of their own so that builds run in parallel.
#include "gathered_launch_sm90.cuh"

namespace lorafuse::sm90 {

void launch_gathered_gated(const GatheredLinear& p, Stream stream) {
  choose_type(p.type, [&]<class T>(T) {
    if (p.transposed) {
      launch_gathered_kernel<T, 128, 256, true, true, Gates::kForward>(p, stream);
    } else {
      launch_gathered_kernel<T, 128, 256, false, true, Gates::kForward>(p, stream);
    }
  });
}

}  // namespace lorafuse::sm90

// The gathered kernels with kTransposed true, in a file of their own so that builds run in parallel.
#include "gathered_launch_sm90.cuh"

namespace lorafuse::sm90 {

template void launch_gathered<true>(const GatheredLinear&, Stream);

}  // namespace lorafuse::sm90

// The grouped kernels with kTransposed true, in a file of their own so that builds run in parallel.
#include "grouped_launch_sm90.cuh"

namespace lorafuse::sm90 {

template void launch_grouped<true>(const GroupedLinear&, Stream);

}  // namespace lorafuse::sm90

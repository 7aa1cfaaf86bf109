// The kernels of Form::kDxDropout, in a file of their own so that builds run in parallel.
#include "linear_launch_sm90.cuh"

namespace lorafuse::sm90 {

template void launch_linear<Form::kDxDropout>(const Linear&, Stream);

}  // namespace lorafuse::sm90

// grouped_linear of api.hpp: what the grouped sm_90 kernels can run.
#include "grouped_launch_sm90.cuh"
#include "ragged_checks.hpp"

namespace lorafuse {

void grouped_linear(const GroupedLinear& p, void* stream) {
  using namespace sm90;
  if (!check_ragged(p, p.N, p.N)) return;
  check_address("workspace", p.workspace, 4);
  if (p.transposed) {
    launch_grouped<true>(p, static_cast<Stream>(stream));
  } else {
    launch_grouped<false>(p, static_cast<Stream>(stream));
  }
}

}  // namespace lorafuse

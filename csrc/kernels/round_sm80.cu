// Host side of an adapter's rounding in a launch of its own: checks and the launch.
#include <lorafuse/ptx/launch.cuh>

#include "dispatch.hpp"
#include "round_checks.hpp"
#include "round_sm80.cuh"

namespace lorafuse {

void round_adapter(const Round& p, void* stream) {
  using namespace skinny;
  require(p.out != nullptr, "out is null");
  check_round(p, p.type);
  choose_type(p.type, [&]<class T>(T) {
    LaunchConfig config{grid_size(ceil_div<int64_t>(round_chunks(p), kThreads)), kThreads};
    launch(round_kernel<T>, config, static_cast<Stream>(stream), p);
  });
}

}  // namespace lorafuse

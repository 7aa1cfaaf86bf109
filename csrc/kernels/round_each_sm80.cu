// Adapters rounded side by side: checks, the kernel and its launch.
#include "group_launch.hpp"

#include "dispatch.hpp"
#include "round_checks.hpp"
#include "round_sm80.cuh"

namespace lorafuse {
namespace skinny {

template <class T>
LF_KERNEL_SHARED(kThreads, 4) round_each_kernel(LF_GRID_CONSTANT RoundEach p) {
  // the product sets itself up and reads x and w meanwhile; it reads adapters only after this launch is complete
  ptx::let_next_launch_start();
  int64_t block = static_cast<int64_t>(blockIdx.x);
  int which = 0;
  const auto blocks = [&] { return ceil_div<int64_t>(round_chunks(p.each[which]), kThreads); };
  while (block >= blocks()) {
    block -= blocks();
    ++which;
  }
  round_chunk<T>(p.each[which], block * kThreads + static_cast<int64_t>(threadIdx.x));
}

}  // namespace skinny

bool round_each(const RoundEach& p, Type type, Stream stream) {
  using namespace skinny;
  int64_t blocks = 0;
  for (const Round& one : p.each) {
    check_round(one, type);
    blocks += ceil_div<int64_t>(round_chunks(one), kThreads);
  }
  if (blocks == 0) return false;
  choose_type(type, [&]<class T>(T) {
    launch(round_each_kernel<T>, LaunchConfig{grid_size(blocks), kThreads}, stream, p);
  });
  return true;
}

}  // namespace lorafuse

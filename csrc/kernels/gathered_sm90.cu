// gathered_linear of api_gathered.hpp: what the gathered sm_90 kernels can run.
#include "gathered_launch_sm90.cuh"
#include "ragged_checks.hpp"

namespace lorafuse {

void gathered_linear(const GatheredLinear& p, void* stream) {
  using namespace sm90;
  const bool gated = p.h != nullptr, backward = p.u != nullptr;
  if (!check_ragged(p, gated && !backward ? 2 * p.N : p.N, gated ? 2 * p.N : p.N)) return;
  require(p.choices >= 1 && p.choices < int64_t{1} << 31, "choices of ", p.choices, "; a token has at least 1");
  require(p.order != nullptr || p.choices == 1, "choices of ", p.choices, " without an order");
  if (p.order != nullptr) check_address("order", p.order, 8);
  check_address("workspace", p.workspace, 4);
  if (gated) {
    check_size("columns of gate and up", 2 * p.N);
    check_matrix("h", p.h, p.N, p.stride_h);
    require(p.order != nullptr, "h without an order");
    require(p.tiling.block_m == 128 && p.tiling.block_n == 256, "tiles of ", p.tiling.block_m, " x ", p.tiling.block_n,
            "; those of gate and up are 128 x 256");
    const int activation = static_cast<int>(p.activation);
    require(activation >= 0 && activation < kActivations, "activation ", activation, "; there are 0 to ",
            kActivations - 1);
  }
  if (backward) {
    require(gated, "u without h");
    check_matrix("u", p.u, 2 * p.N, p.stride_u);
    require(p.bias == nullptr, "a bias of dh");
    if (p.row_scale != nullptr) check_address("row_scale", p.row_scale, 4);
    if (p.products != nullptr) check_address("products", p.products, 4);
    launch_gathered_gradients(p, static_cast<Stream>(stream));
  } else if (gated) {
    launch_gathered_gated(p, static_cast<Stream>(stream));
  } else if (p.transposed) {
    launch_gathered<true>(p, static_cast<Stream>(stream));
  } else {
    launch_gathered<false>(p, static_cast<Stream>(stream));
  }
}

}  // namespace lorafuse

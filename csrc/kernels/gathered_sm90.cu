// gathered_linear of api_gathered.hpp: what the gathered sm_90 kernels can run.
#include "checks.hpp"
#include "gathered_launch_sm90.cuh"

namespace lorafuse {

void gathered_linear(const GatheredLinear& p, void* stream) {
  using namespace sm90;
  check_size("rows", p.rows);
  check_size("groups", p.groups);
  check_size("N", p.N);
  check_size("K", p.K);
  check_size("R", p.R);
  if (p.rows == 0 || p.groups == 0 || p.N == 0) return;
  require(p.K > 0, "K of 0 has nothing to multiply");
  require(p.N % 8 == 0, "N of ", p.N, " is not a multiple of 8");
  require(p.tiling.cluster == 1, "clusters of ", p.tiling.cluster, " blocks; grouped kernels have none (1)");
  require(p.tiling.block_m == 128 || p.tiling.block_m == 64, "block_m of ", p.tiling.block_m,
          "; tiles have 64 or 128 rows");
  require(p.choices >= 1 && p.choices < int64_t{1} << 31, "choices of ", p.choices, "; a token has at least 1");
  require(p.order != nullptr || p.choices == 1, "choices of ", p.choices, " without an order");
  if (p.order != nullptr) check_address("order", p.order, 8);
  check_address("offsets", p.offsets, 8);
  check_address("workspace", p.workspace, 4);
  check_matrix("x", p.x, p.K, p.stride_x);
  const bool gated = p.h != nullptr;
  // of w, b and y
  const int64_t columns = gated ? 2 * p.N : p.N;
  check_size("columns of gate and up", columns);
  check_matrix("w", p.w, p.transposed ? columns : p.K, p.transposed ? columns : p.K);
  check_matrix("y", p.y, columns, p.stride_y);
  if (gated) {
    check_matrix("h", p.h, p.N, p.stride_h);
    require(p.order != nullptr, "h without an order");
    require(p.tiling.block_m == 128 && p.tiling.block_n == 256, "tiles of ", p.tiling.block_m, " x ", p.tiling.block_n,
            "; those of gate and up are 128 x 256");
    const int activation = static_cast<int>(p.activation);
    require(activation >= 0 && activation < kActivations, "activation ", activation, "; there are 0 to ",
            kActivations - 1);
  }
  if (p.bias != nullptr) check_address("bias", p.bias, 4);
  if (p.R > 0) {
    check_matrix("xa", p.xa, p.R, p.stride_xa);
    check_matrix("b", p.b, p.transposed ? columns : p.R, p.transposed ? columns : p.R);
  }
  if (gated) {
    launch_gathered_gated(p, static_cast<Stream>(stream));
  } else if (p.transposed) {
    launch_gathered<true>(p, static_cast<Stream>(stream));
  } else {
    launch_gathered<false>(p, static_cast<Stream>(stream));
  }
}

}  // namespace lorafuse

// Host: what launches over ragged rows require of their operands alike.
#pragma once

#include "checks.hpp"

namespace lorafuse::sm90 {

// Of GroupedLinear or GatheredLinear: sizes, tiles and the rows of each matrix; w and b have `columns`, y has
// `y_columns`. False: there is nothing to compute.
template <class P>
bool check_ragged(const P& p, int64_t columns, int64_t y_columns) {
  check_size("rows", p.rows);
  check_size("groups", p.groups);
  check_size("N", p.N);
  check_size("K", p.K);
  check_size("R", p.R);
  if (p.rows == 0 || p.groups == 0 || p.N == 0) return false;
  require(p.K > 0, "K of 0 has nothing to multiply");
  check_features("N", p.N);
  require(p.tiling.cluster == 1, "clusters of ", p.tiling.cluster, " blocks; grouped kernels have none (1)");
  require(p.tiling.block_m == 128 || p.tiling.block_m == 64, "block_m of ", p.tiling.block_m,
          "; tiles have 64 or 128 rows");
  check_address("offsets", p.offsets, 8);
  check_matrix("x", p.x, p.K, p.stride_x);
  check_matrix("w", p.w, p.transposed ? columns : p.K, p.transposed ? columns : p.K);
  check_matrix("y", p.y, y_columns, p.stride_y);
  if (p.bias != nullptr) check_address("bias", p.bias, 4);
  if (p.R > 0) {
    check_matrix("xa", p.xa, p.R, p.stride_xa);
    check_matrix("b", p.b, p.transposed ? columns : p.R, p.transposed ? columns : p.R);
  }
  return true;
}

}  // namespace lorafuse::sm90

// Host: what launches that round an adapter require of it.
#pragma once

#include "checks.hpp"

namespace lorafuse::skinny {

// An adapter that is rounded for a product of `type`; none has no place.
inline void check_round(const Round& p, Type type) {
  if (!p.out) return;
  require(p.rows >= 1 && p.columns >= 1, "an adapter of ", p.rows, " rows and ", p.columns, " columns is empty");
  require(p.in != nullptr, "in is null");
  const int64_t columns_in = p.transposed ? p.rows : p.columns;
  check_stride("in", columns_in, p.stride_in);
  require(p.type == type, "an adapter is rounded to type ", static_cast<int>(p.type), " for a product of type ",
          static_cast<int>(type));
  check_adapter_type(p.in_type, type);
  check_matrix("out", p.out, p.columns, p.stride_out);
}
inline int grid_size(int64_t blocks) {
  require(blocks < int64_t{1} << 31, "a launch of ", blocks, " blocks is above 2^31 - 1");
  return static_cast<int>(blocks);
}

}  // namespace lorafuse::skinny

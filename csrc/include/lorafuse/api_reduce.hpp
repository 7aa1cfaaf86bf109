// The reduction over dy of layers of one x in one launch. Conventions as in api_siblings.hpp.
#pragma once

#include <lorafuse/api_siblings.hpp>

namespace lorafuse {

// reduce_dy of `count` layers, 1 to 4, each bit as there: dy_i [M, N_i], b_i [N_i, R_i] of b_type_i, xa_i [M, R_i], dyb_i
// [M, R_i] with columns in [R_i, the next multiple of 8) zero, db_i and dbias_i, of each layer one at least of the three.
// `workspace`: reduce_each_workspace(p) bytes. Layers whose partial sums of dyb would take more than `dyb_bytes` together
// follow each other, and one that alone does is taken in chunks of rows. Not yet measured on a GPU.
struct ReduceEach {
  Type type;
  int count;
  int64_t M;
  Each<Type> b_type;
  Each<int64_t> N, R;
  Each<const void*> dy;
  Each<int64_t> stride_dy;
  Each<const void*> b = {};
  Each<int64_t> stride_b = {};
  Each<const void*> xa = {};
  Each<int64_t> stride_xa = {};
  Each<float> scale;
  Each<void*> dyb = {};
  Each<int64_t> stride_dyb = {};
  Each<void*> db = {};
  Each<void*> dbias = {};
  void* workspace = nullptr;
  int64_t dyb_bytes = int64_t{64} << 20;
  int sms = 0;
};
int64_t reduce_each_workspace(const ReduceEach& p);
void reduce_each(const ReduceEach& p, void* stream);

}  // namespace lorafuse

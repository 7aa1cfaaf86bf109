// Host: what launches for layers of one x have in common.
#pragma once

#include <lorafuse/api_siblings.hpp>
#include <lorafuse/ptx/launch.cuh>

#include "checks.hpp"

namespace lorafuse {

struct RoundEach {
  Round each[kMostSiblings];
};

// Rounds adapters for products of `type` in one launch, which the next one may overlap. False: there are none.
bool round_each(const RoundEach& p, Type type, Stream stream);

// out [M, R] of `type`, and zeros up to its stride: the sum of `count` matrices [M, pitch] of fp32, one after the other in
// memory, in that order.
void add_matrices(const float* matrices, int count, int64_t M, int64_t R, int64_t pitch, Type type, void* out,
                  int64_t stride, Stream stream);

}  // namespace lorafuse

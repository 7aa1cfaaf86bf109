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

}  // namespace lorafuse

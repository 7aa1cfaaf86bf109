// Host: what launches for layers of one x have in common.
#pragma once

#include <lorafuse/api_siblings.hpp>
#include <lorafuse/ptx/launch.cuh>

#include "checks.hpp"

namespace lorafuse {

inline void check_features(const char* name, int64_t features) {
  check_size(name, features);
  require(features >= 8 && features % 8 == 0, name, " of ", features, " is not a positive multiple of 8");
}

struct RoundEach {
  Round each[kMostSiblings];
};

// Rounds adapters for products of `type` in one launch, which the next one may overlap. False: there are none.
bool round_each(const RoundEach& p, Type type, Stream stream);

}  // namespace lorafuse

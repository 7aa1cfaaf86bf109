// Functions of fp32 that activations are made of.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

// 2 ulp and the rounding of x · log2 e: below a rounding of 16-bit elements for every x whose exponential is finite.
LF_DEVICE float exp(float x) { return __expf(x); }
LF_DEVICE float erf(float x) { return erff(x); }
// 1 / x in 2 ulp, 0 of infinity.
LF_DEVICE float reciprocal(float x) { return __fdividef(1.0f, x); }

}  // namespace lorafuse::ptx

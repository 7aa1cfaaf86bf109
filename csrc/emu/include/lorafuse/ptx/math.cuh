// Functions of fp32 that activations are made of, emulated.
#pragma once

#include <cmath>

#include <lorafuse/common.cuh>

namespace lorafuse::ptx {

inline float exp(float x) { return std::exp(x); }
inline float erf(float x) { return std::erf(x); }
inline float reciprocal(float x) { return 1.0f / x; }

}  // namespace lorafuse::ptx

// Activations of gate and up, and their slopes: those of lorafuse/activation.py, in fp32.
#pragma once

#include <type_traits>

#include <lorafuse/api_gated.hpp>
#include <lorafuse/ptx/math.cuh>

namespace lorafuse {

struct Activated {
  float value, slope;
};

LF_DEVICE float sigmoid(float x) { return ptx::reciprocal(1.0f + ptx::exp(-x)); }

// act(x) and act'(x). NaN stays, as in torch.
template <Activation kActivation>
LF_DEVICE Activated activate(float x) {
  if constexpr (kActivation == Activation::SILU) {
    const float s = sigmoid(x);
    return {x * s, s * (1.0f + x * (1.0f - s))};
  } else if constexpr (kActivation == Activation::GELU) {
    const float cdf = 0.5f * (1.0f + ptx::erf(x * 0.70710678f));
    return {x * cdf, cdf + x * 0.39894228f * ptx::exp(-0.5f * x * x)};
  } else if constexpr (kActivation == Activation::GELU_TANH) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    const float t = 2.0f * sigmoid(2.0f * inner) - 1.0f;
    const float slope = 0.79788456f * (1.0f + 0.134145f * x * x);
    return {0.5f * x * (1.0f + t), 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * slope};
  } else if constexpr (kActivation == Activation::RELU) {
    return {x <= 0.0f ? 0.0f : x, x <= 0.0f ? 0.0f : 1.0f};
  } else {
    static_assert(kActivation == Activation::RELU2);
    const float positive = x <= 0.0f ? 0.0f : x;
    return {positive * positive, 2.0f * positive};
  }
}

// h of gate and up, and its partial derivatives.
struct Gated {
  float h, of_gate, of_up;
};

template <Activation kActivation>
LF_DEVICE Gated activate(float gate, float up) {
  if constexpr (kActivation == Activation::CLAMPED_SWIGLU) {
    // at the limit itself the gradient passes
    const float low = gate > 7.0f ? 7.0f : gate;
    const float raised = (up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up) + 1.0f;
    const float s = sigmoid(1.702f * low);
    return {raised * low * s, gate <= 7.0f ? raised * s * (1.0f + 1.702f * low * (1.0f - s)) : 0.0f,
            up >= -7.0f && up <= 7.0f ? low * s : 0.0f};
  } else {
    const Activated of_gate = activate<kActivation>(gate);
    return {of_gate.value * up, of_gate.slope * up, of_gate.value};
  }
}

// Calls f with the activation as a constant: one kernel has all of them.
template <class F>
LF_DEVICE void choose_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::SILU: return f(std::integral_constant<Activation, Activation::SILU>{});
    case Activation::GELU: return f(std::integral_constant<Activation, Activation::GELU>{});
    case Activation::GELU_TANH: return f(std::integral_constant<Activation, Activation::GELU_TANH>{});
    case Activation::RELU: return f(std::integral_constant<Activation, Activation::RELU>{});
    case Activation::RELU2: return f(std::integral_constant<Activation, Activation::RELU2>{});
    case Activation::CLAMPED_SWIGLU: return f(std::integral_constant<Activation, Activation::CLAMPED_SWIGLU>{});
  }
}

}  // namespace lorafuse

// Gate and up of a gated MLP with their activation, each way in one launch. Conventions as in api_siblings.hpp; of arrays,
// entry 0 is gate's and entry 1 up's.
#pragma once

#include <lorafuse/api_siblings.hpp>

namespace lorafuse {

// h = act(gate) · up, but for the last, gpt-oss's: (clamp(up) + 1) · g · sigmoid(1.702 g) with g the clamped gate.
enum class Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3, RELU2 = 4, CLAMPED_SWIGLU = 5 };
constexpr int kActivations = 6;

// gate and up are x w_iᵀ + bias_i + xa_i b_iᵀ, h their activation, of what was rounded: x [M, K], w_i [N, K], bias_i [N]
// or null, xa [M, R_0 + R_1] of both side by side, b_i [N, R_i] with the scale inside; gate, up and h [M, N]. `up` null:
// it is not stored. R_i 0: the product alone. `rounded` as in SiblingsForward. Not yet measured on a GPU; `lorafuse tune`
// can choose it.
//
// Where `ha` is not null, it is h a_downᵀ [M, R_down] too, and zeros up to its stride, from h as it is stored: a_down
// [R_down, N] in x's type, whose rounding is rounded[2], R_down 1 to 64; rounded[3] may be another adapter. `partials`: gated_forward_partials(p) bytes, fp32
// sums of a column of tiles each, which another launch adds in their order.
struct GatedForward {
  Type type;
  Activation activation;
  int64_t M, N, K;
  Each<int64_t> R = {};
  const void* x;
  int64_t stride_x;
  Each<const void*> w;
  Each<int64_t> stride_w;
  Each<const void*> bias = {};
  const void* xa = nullptr;
  int64_t stride_xa = 0;
  Each<const void*> b = {};
  Each<int64_t> stride_b = {};
  void* gate;
  int64_t stride_gate;
  void* up = nullptr;
  int64_t stride_up = 0;
  void* h;
  int64_t stride_h;
  int64_t R_down = 0;
  const void* a_down = nullptr;
  int64_t stride_a_down = 0;
  void* ha = nullptr;
  int64_t stride_ha = 0;
  void* partials = nullptr;
  Each<Round> rounded = {};
  Tiling tiling;
  uint32_t* workspace;  // as in Linear
};
int64_t gated_forward_partials(const GatedForward& p);
void gated_forward(const GatedForward& p, void* stream);

// dgate, dup and h [M, N] for dh = dy w + mask ⊙ (dyb a), rounded and not stored: dy [M, K], w [K, N] and a [R, N] those
// of the down projection, dyb [M, R], gate and up [M, N]. The mask as in Linear, that of dropout on h. `rounded` is that of
// a.
struct GatedBackward {
  Type type;
  Activation activation;
  int64_t M, N, K, R;
  const void* dy;
  int64_t stride_dy;
  const void* w;
  int64_t stride_w;
  const void* dyb;
  int64_t stride_dyb;
  const void* a;
  int64_t stride_a;
  const void* gate;
  int64_t stride_gate;
  const void* up;
  int64_t stride_up;
  void* dgate;
  int64_t stride_dgate;
  void* dup;
  int64_t stride_dup;
  void* h;
  int64_t stride_h;
  const int64_t* seed = nullptr;
  uint32_t drop_below = 0;
  Round rounded = {};
  Tiling tiling;
  uint32_t* workspace;  // as in Linear
};
void gated_backward(const GatedBackward& p, void* stream);

}  // namespace lorafuse

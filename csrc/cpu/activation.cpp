// Gated activations and their backward in fp32, in one pass over the operands, for CPUs with AVX2 and FMA: those of
// lorafuse/activation.py.
//
//   h = act(gate) * up         dgate = dh * up * act'(gate)         dup = dh * act(gate)
//
// but for gpt-oss's, a function of both. The last elements go through the same instructions as all others, so that an
// element's bits depend on nothing but its operands. Not finite is what torch makes so, but for slopes of gelu_tanh far
// out: torch's are NaN from 2e19 on, these are 0 and 1.

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define LORAFUSE_FMA __attribute__((target("avx2,fma")))

namespace {

// in the order of lorafuse/activation.py's `_NUMBERS`
enum class Act { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kClampedSwiglu };
// of gpt-oss
constexpr float kGateLimit = 7.0f, kGateSlope = 1.702f;

// some elements of a row; dh may be null, then h is computed alone, or else h. dgate may be in dh's place
struct Gated {
  const float *gate, *up;
  float* h;
  const float* dh;
  float *dgate, *dup;
};

LORAFUSE_FMA inline __m256 set(float x) { return _mm256_set1_ps(x); }
LORAFUSE_FMA inline __m256 mul(__m256 a, __m256 b) { return _mm256_mul_ps(a, b); }
LORAFUSE_FMA inline __m256 mul_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
LORAFUSE_FMA inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(set(-0.0f), x); }
// of a NaN x, a NaN
LORAFUSE_FMA inline __m256 at_least(__m256 x, float low) { return _mm256_max_ps(set(low), x); }
LORAFUSE_FMA inline __m256 at_most(__m256 x, float high) { return _mm256_min_ps(set(high), x); }

LORAFUSE_FMA inline __m256 power_of_2(__m256i k) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k, _mm256_set1_epi32(127)), 23));
}

// exp(x) of x <= 0: x = n ln2 + r, a polynomial of r, and 2^n in two factors, since results may be denormal
LORAFUSE_FMA inline __m256 exp_of_negative(__m256 x) {
  x = at_least(x, -104.0f);
  const __m256 n = _mm256_round_ps(mul(x, set(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 r = mul_add(n, set(2.12194440e-4f), mul_add(n, set(-0.693359375f), x));
  // minimax of (exp(r) - 1 - r) / r^2, within 1.2e-7 of it
  __m256 p = set(1.3901287e-03f);
  for (const float c : {8.363146e-03f, 4.1666854e-02f, 1.6666578e-01f, 0.5f}) p = mul_add(p, r, set(c));
  p = _mm256_add_ps(mul_add(mul(r, r), p, r), set(1.0f));
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  return mul(mul(p, power_of_2(half)), power_of_2(_mm256_sub_epi32(whole, half)));
}

struct Chances {
  // of x and of -x, which sum to 1: neither is a difference, so that both have few wrong bits
  __m256 of, other;
};

LORAFUSE_FMA inline Chances swapped(__m256 x, __m256 large, __m256 small) {
  return {_mm256_blendv_ps(large, small, x), _mm256_blendv_ps(small, large, x)};
}

LORAFUSE_FMA inline Chances sigmoid(__m256 x) {
  const __m256 e = exp_of_negative(_mm256_or_ps(x, set(-0.0f)));
  const __m256 large = _mm256_div_ps(set(1.0f), _mm256_add_ps(e, set(1.0f)));
  return swapped(x, large, mul(e, large));
}

// the normal distribution at x, and its density
LORAFUSE_FMA inline __m256 normal(__m256 x, __m256* density) {
  // at 20 both are 0
  const __m256 a = at_most(magnitude(x), 20.0f), half = mul(a, set(0.5f)), square = mul(a, half);
  const __m256 rounding = _mm256_fmsub_ps(a, half, square);
  __m256 e = exp_of_negative(_mm256_xor_ps(square, set(-0.0f)));
  e = _mm256_fnmadd_ps(e, rounding, e);
  // minimax in s = (a - 4) / (a + 4) of (a + 4) exp(a^2 / 2) times the tail beyond a, within 8e-9 of it
  const __m256 inverse = _mm256_div_ps(set(1.0f), _mm256_add_ps(a, set(4.0f)));
  const __m256 s = mul(_mm256_sub_ps(a, set(4.0f)), inverse);
  __m256 p = set(-1.2952831e-04f);
  for (const float c : {1.8463003e-04f, 1.5718589e-03f, -3.5149825e-03f, -7.5267274e-03f, 6.0404144e-02f,
                        -1.865232e-01f, 3.8713688e-01f, -6.078966e-01f, 7.5528514e-01f}) {
    p = mul_add(p, s, set(c));
  }
  const __m256 tail = mul(mul(p, inverse), e);
  *density = mul(e, set(0.398942280f));
  return swapped(x, _mm256_sub_ps(set(1.0f), tail), tail).of;
}

// the slope of relu is all bits or none, that of relu2 half of it
struct Activated {
  __m256 value, slope;
};

template <Act kAct>
LORAFUSE_FMA inline Activated activated(__m256 x) {
  const __m256 one = set(1.0f);
  if constexpr (kAct == Act::kSilu) {
    const Chances s = sigmoid(x);
    return {mul(x, s.of), mul(s.of, mul_add(x, s.other, one))};
  } else if constexpr (kAct == Act::kGelu) {
    __m256 density;
    const __m256 chance = normal(x, &density);
    return {mul(x, chance), mul_add(x, density, chance)};
  } else if constexpr (kAct == Act::kGeluTanh) {
    // (1 + tanh(z)) / 2 = sigmoid(2 z); at 16 it is 0 or 1
    const __m256 near = at_least(at_most(x, 16.0f), -16.0f), square = mul(near, near);
    const Chances s = sigmoid(mul(near, mul_add(square, set(2.0f * 0.79788456f * 0.044715f), set(2.0f * 0.79788456f))));
    const __m256 inner = mul_add(square, set(6.0f * 0.79788456f * 0.044715f), set(2.0f * 0.79788456f));
    return {mul(x, s.of), mul(s.of, mul_add(mul(near, inner), s.other, one))};
  } else {
    const __m256 positive = _mm256_max_ps(_mm256_setzero_ps(), x);
    if constexpr (kAct == Act::kRelu2) return {mul(positive, positive), positive};
    // all bits above 0, and of a NaN
    return {positive, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NLE_UQ)};
  }
}

struct Gradients {
  __m256 h, dgate, dup;
};

template <Act kAct>
LORAFUSE_FMA inline Gradients gated(__m256 gate, __m256 up, __m256 dh) {
  if constexpr (kAct == Act::kClampedSwiglu) {
    const __m256 one = set(1.0f), low = at_most(gate, kGateLimit), scaled = mul(low, set(kGateSlope));
    const __m256 raised = _mm256_add_ps(at_least(at_most(up, kGateLimit), -kGateLimit), one);
    // at the limit itself the gradient passes
    const __m256 gate_passes = _mm256_and_ps(_mm256_cmp_ps(gate, set(kGateLimit), _CMP_LE_OQ), one);
    const __m256 up_passes = _mm256_and_ps(_mm256_cmp_ps(magnitude(up), set(kGateLimit), _CMP_LE_OQ), one);
    const Chances s = sigmoid(scaled);
    const __m256 value = mul(low, s.of), slope = mul(s.of, mul_add(scaled, s.other, one));
    return {mul(raised, value), mul(mul(mul(dh, raised), slope), gate_passes),
            mul(mul(mul(dh, low), s.of), up_passes)};
  } else {
    const Activated of = activated<kAct>(gate);
    __m256 both = mul(dh, up);
    // in torch's order, which matters where a product leaves fp32's range
    if constexpr (kAct == Act::kRelu2) both = _mm256_add_ps(both, both);
    // under none of relu's bits nothing passes, no NaN either
    return {mul(of.value, up), kAct == Act::kRelu ? _mm256_and_ps(both, of.slope) : mul(both, of.slope),
            mul(dh, of.value)};
  }
}

// the first `count` elements of eight
struct Some {
  __m256i mask;
  LORAFUSE_FMA explicit Some(int64_t count)
      : mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
  LORAFUSE_FMA __m256 load(const float* from) const { return _mm256_maskload_ps(from, mask); }
  LORAFUSE_FMA void store(float* to, __m256 x) const { _mm256_maskstore_ps(to, mask, x); }
};
struct All {
  LORAFUSE_FMA __m256 load(const float* from) const { return _mm256_loadu_ps(from); }
  LORAFUSE_FMA void store(float* to, __m256 x) const { _mm256_storeu_ps(to, x); }
};

template <Act kAct, class Lanes>
LORAFUSE_FMA inline void run_lanes(const Gated& of, int64_t i, Lanes lanes) {
  const __m256 gate = lanes.load(of.gate + i), up = lanes.load(of.up + i);
  if (!of.dh) return lanes.store(of.h + i, gated<kAct>(gate, up, set(0.0f)).h);
  const Gradients made = gated<kAct>(gate, up, lanes.load(of.dh + i));
  if (of.h) lanes.store(of.h + i, made.h);
  lanes.store(of.dgate + i, made.dgate);
  lanes.store(of.dup + i, made.dup);
}

template <Act kAct>
LORAFUSE_FMA void run_row(const Gated& of, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) run_lanes<kAct>(of, i, All{});
  if (i < count) run_lanes<kAct>(of, i, Some(count - i));
}

inline void run_row(Act act, const Gated& of, int64_t count) {
  switch (act) {
    case Act::kSilu: return run_row<Act::kSilu>(of, count);
    case Act::kGelu: return run_row<Act::kGelu>(of, count);
    case Act::kGeluTanh: return run_row<Act::kGeluTanh>(of, count);
    case Act::kRelu: return run_row<Act::kRelu>(of, count);
    case Act::kRelu2: return run_row<Act::kRelu2>(of, count);
    case Act::kClampedSwiglu: return run_row<Act::kClampedSwiglu>(of, count);
  }
}

}  // namespace
#endif

extern "C" {

// Operands of `lorafuse_gated`; ctypes fills it. A row's pitch follows its address.
struct LorafuseGated {
  int act;
  const float* gate;
  int64_t gate_row;
  const float* up;
  int64_t up_row;
  float* h;
  int64_t h_row;
  const float* dh;
  int64_t dh_row;
  float* dgate;
  int64_t dgate_row;
  float* dup;
  int64_t dup_row, M, C;
};

// See the top; `dh` may be null with what belongs to it, or `h`, and dgate may be dh.
__attribute__((visibility("default"))) void lorafuse_gated(const LorafuseGated* of, int threads) {
#if defined(__x86_64__)
  const int64_t step = (of->M + threads - 1) / threads;
  lorafuse::parallel(threads, (of->M + step - 1) / step, [&](int64_t i) {
    for (int64_t m = i * step; m < std::min(of->M, (i + 1) * step); ++m) {
      const auto row = [m](auto* rows, int64_t pitch) { return rows ? rows + m * pitch : nullptr; };
      run_row(
          Act(of->act),
          {row(of->gate, of->gate_row), row(of->up, of->up_row), row(of->h, of->h_row), row(of->dh, of->dh_row),
           row(of->dgate, of->dgate_row), row(of->dup, of->dup_row)},
          of->C);
    }
  });
#endif
}
}

// What sm_80 has: copy_async in two stages, ldmatrix and mma; and shuffles and shared memory within a warp.
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/mma.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

constexpr int kRows = 32, kColumns = 16, kTileK = 64, kThreads = 64;

// d[32, 16] of a block of two warps: a [M, K], b [16, K] or, transposed, [K, 16]; d fp32.
template <class T>
struct MmaArguments {
  int m, k;
  const T* a;
  const T* b;
  float* d;
};

template <class T, bool kTransposed>
LF_KERNEL(kThreads)
mma_kernel(const MmaArguments<T> p) {
  constexpr int kBytesA = kRows * kTileK * 2, kBytes = kBytesA + kColumns * kTileK * 2;
  LF_DYNAMIC_SHARED(shared);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int first_row = static_cast<int>(blockIdx.x) * kRows, steps = ceil_div(p.k, kTileK);
  const auto load = [&](int step) {
    uint8_t* a = shared + step % 2 * kBytes;
    uint8_t* b = a + kBytesA;
    for (int i = thread; i < kRows * kTileK / 8; i += kThreads) {
      const int row = i / 8, k = step * kTileK + i % 8 * 8;
      const bool valid = first_row + row < p.m && k < p.k;
      ptx::copy_async(a + i * 16, p.a + (valid ? (first_row + row) * p.k + k : 0), valid ? 16 : 0);
    }
    for (int i = thread; i < kColumns * kTileK / 8; i += kThreads) {
      const int k = step * kTileK + (kTransposed ? i / 2 : i % 8 * 8);
      const T* from = kTransposed ? p.b + k * kColumns + i % 2 * 8 : p.b + i / 8 * p.k + k;
      ptx::copy_async(b + i * 16, k < p.k ? from : p.b, k < p.k ? 16 : 0);
    }
    if (!LF_PLANTED("mma: no commit")) ptx::copy_async_commit();
  };
  float d[2][4] = {};
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      if (LF_PLANTED("mma: waits for one group too few")) {
        ptx::copy_async_wait<2>();
      } else if (!LF_PLANTED("mma: no wait")) {
        ptx::copy_async_wait<1>();
      }
    } else {
      ptx::copy_async_wait<0>();
    }
    if (!LF_PLANTED("mma: no barrier after the wait")) ptx::block_sync();
    const uint8_t* a = shared + step % 2 * kBytes;
    const uint8_t* b = a + kBytesA;
    for (int k = 0; k < kTileK; k += 16) {
      uint32_t a_values[4], b_values[4];
      ptx::ldmatrix(a_values, a + (warp * 16 + lane % 16) * kTileK * 2 + (k + lane / 16 * 8) * 2);
      if constexpr (kTransposed) {
        ptx::ldmatrix_transposed(b_values, b + (k + lane % 16) * kColumns * 2 + lane / 16 * 16);
      } else {
        ptx::ldmatrix(b_values, b + (lane % 8 + lane / 16 * 8) * kTileK * 2 + (k + lane / 8 % 2 * 8) * 2);
      }
      ptx::mma<T>(d[0], a_values, b_values[0], b_values[1]);
      ptx::mma<T>(d[1], a_values, b_values[LF_PLANTED("mma: wrong half of b") ? 0 : 2], b_values[3]);
    }
    if (!LF_PLANTED("mma: no barrier before the next copy")) ptx::block_sync();
  }
  for (int i = 0; i < 8; ++i) {
    const int row = first_row + warp * 16 + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row < p.m) ptx::store_global(p.d + row * kColumns + column, d[i / 4][i % 4]);
  }
}

template <class T, bool kTransposed>
std::string run_mma() {
  const int m = 72, k = 200;
  static const std::vector<T> a = numbers<T>(m * k, 3), b = numbers<T>(kColumns * k, 4);
  std::vector<double> expected(m * kColumns);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < kColumns; ++j) {
      for (int l = 0; l < k; ++l) {
        expected[i * kColumns + j] += static_cast<double>(value_of(a[i * k + l])) *
                                      value_of(kTransposed ? b[l * kColumns + j] : b[j * k + l]);
      }
    }
  }
  std::vector<float> d(m * kColumns, NAN);
  emu::forget_memory();
  emu::declare_memory(a.data(), a.size() * 2, "a");
  emu::declare_memory(b.data(), b.size() * 2, "b");
  emu::declare_memory(d.data(), d.size() * 4, "d", true);
  launch(mma_kernel<T, kTransposed>, {ceil_div(m, kRows), kThreads, 2 * (kRows + kColumns) * kTileK * 2}, nullptr,
         MmaArguments<T>{m, k, a.data(), b.data(), d.data()});
  return compare(d, expected, 1e-5);
}

// out[i] = the sum of in[0 … 63], in three ways: by lanes, by neighbours in shared memory, across two warps.
LF_KERNEL(64) warp_kernel(const float* in, float* out) {
  LF_DYNAMIC_SHARED(raw);
  float* shared = reinterpret_cast<float*>(raw);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const float mine = ptx::load_global(in + thread);
  float sum = mine;
  for (int mask = 16; mask > 0; mask /= 2) {
    if (LF_PLANTED("warp: a lane leaves the shuffles") && lane == 5 && mask == 2) break;
    sum += ptx::shuffle_xor(sum, mask);
  }
  ptx::store_shared(shared + thread, sum);
  if (!LF_PLANTED("warp: no warp_sync")) ptx::warp_sync();
  const float neighbour = ptx::load_shared<float>(shared + (thread ^ 1));
  if (LF_PLANTED("warp: barrier of the wrong count")) {
    ptx::named_barrier_sync<2, 32>();
  } else if (!LF_PLANTED("warp: no block_sync")) {
    ptx::block_sync();
  }
  const float other = ptx::load_shared<float>(shared + (thread ^ 32));
  const float first = ptx::shuffle(neighbour, 3);
  ptx::store_global(out + thread, first + other);
  if (LF_PLANTED("warp: two lanes write one word") && lane < 2) ptx::store_global(out + thread / 32 * 32, 0.0f);
}

std::string run_warp() {
  std::vector<float> in(64), out(64, NAN);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  emu::forget_memory();
  launch(warp_kernel, {1, 64, 256}, nullptr, in.data(), out.data());
  return compare(out, std::vector<double>(64, 2016), 0);
}

// fp16 and bf16 against arithmetic that rounds by itself.
std::string run_numbers() {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float value = emu::fp16_value(half);
    const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25.0);
    if (exponent < 31 && value != (bits & 0x8000 ? -magnitude : magnitude)) {
      return "fp16_value of " + std::to_string(bits);
    }
    if (!std::isnan(value) && emu::fp16_bits(value) != half) return "fp16_bits of " + std::to_string(value);
    if (std::isnan(value) && emu::fp16_bits(value) != 0x7fff) return "fp16_bits of NaN";
    if (exponent >= 30 || bits & 0x8000) continue;
    // halfway to the next goes to the even one
    const float next = emu::fp16_value(static_cast<uint16_t>(bits + 1)), half_way = value + (next - value) / 2;
    const uint16_t even = static_cast<uint16_t>(bits % 2 == 0 ? bits : bits + 1);
    if (emu::fp16_bits(half_way) != even) return "fp16_bits halfway above " + std::to_string(value);
    if (emu::fp16_bits(std::nextafter(half_way, next)) != bits + 1) return "fp16_bits above half";
    if (emu::fp16_bits(std::nextafter(half_way, value)) != bits) return "fp16_bits below half";
  }
  if (emu::fp16_bits(65519.99f) != 0x7bff || emu::fp16_bits(65520.0f) != 0x7c00) return "fp16_bits at infinity";
  if (emu::bf16_bits(1.00390625f) != 0x3f80 || emu::bf16_bits(1.01171875f) != 0x3f82) return "bf16_bits halfway";
  if (emu::bf16_bits(NAN) != 0x7fff || emu::bf16_bits(3.4e38f) != 0x7f80) return "bf16_bits of NaN or at infinity";
  if (ptx::pack<BF16>(1.0f, -2.0f) != 0xc0003f80 || ptx::unpack<FP16>(0xffff3c00) != 1.0f) return "pack or unpack";
  return "";
}

}  // namespace

std::vector<Case> warp_cases() {
  return {
      {"copy_async and mma", run_mma<BF16, false>,
       {{"mma: no commit", "copy_async"},
        {"mma: no wait", "was waited for"},
        {"mma: waits for one group too few", "was waited for"},
        {"mma: no barrier after the wait", ""},
        {"mma: no barrier before the next copy", "race: write of shared memory"},
        {"mma: wrong half of b", "wrong value"}}},
      {"copy_async and mma, transposed", run_mma<FP16, true>, {}},
      {"warp operations", run_warp,
       {{"warp: a lane leaves the shuffles", "diverged"},
        {"warp: no warp_sync", "shared memory"},
        {"warp: no block_sync", "shared memory"},
        {"warp: barrier of the wrong count", "shared memory"},
        {"warp: two lanes write one word", "race: write of"}}},
      {"numbers", run_numbers, {}},
  };
}

}  // namespace lorafuse::selftest

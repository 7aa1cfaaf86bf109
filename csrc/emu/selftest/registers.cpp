// wgmma with a from registers: two sets of them in turn, each written while the product before reads the other.
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/wgmma.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using ptx::Major;
using ptx::TensorMap;

constexpr int kDepth = 128, kBoxBytes = 64 * 64 * 2;

// As the PTX manual gives it: written here once more, not taken from layout.cuh.
uint64_t descriptor(uint32_t address, uint32_t leading) {
  return (address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

template <class T>
struct RegistersArguments {
  int m, n, k;
  const T* a;
  float* d;
};

// d = a b, b [N, K] or, MN-major, [K, N]: a block has 64 rows, all N columns and all of b.
template <class T, int N, Major kMajor>
LF_KERNEL(128)
registers_kernel(LF_GRID_CONSTANT TensorMap map_b, const RegistersArguments<T> p) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* b = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(b + N * kDepth * 2);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(full, N * kDepth * 2);
    for (int n = 0; n < N; n += 64) {
      for (int k = 0; k < kDepth; k += 64) {
        uint8_t* box = b + (n / 64 * (kDepth / 64) + k / 64) * kBoxBytes;
        ptx::tma_load(box, &map_b, kMajor == Major::K ? k : n, kMajor == Major::K ? n : k, full);
      }
    }
  }
  ptx::block_sync();
  ptx::mbarrier_wait(full, 0);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int tile = static_cast<int>(blockIdx.x) * 64;
  float d[N / 2];
  ptx::OperandRegister sets[2][4];
  for (int step = 0; step < kDepth / 16; ++step) {
    ptx::OperandRegister(&a)[4] = sets[step % 2];
    if (LF_PLANTED("registers: fence before they are written")) ptx::wgmma_fence();
    for (int i = 0; i < 8; i += 2) {
      // the manual: row is groupID for a0, a1, a4 and a5, else groupID + 8; columns from a4 on are 8 further
      const int group = lane >> 2, in_group = lane % 4;
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int k = step * 16 + in_group * 2 + (i >= 4 ? 8 : 0), m = tile + warp * 16 + row;
      const auto element = [&](int at) { return m < p.m && at < p.k ? value_of(p.a[m * p.k + at]) : 0.0f; };
      const int swapped = i == 2 ? 2 : i == 4 ? 1 : i / 2;
      const bool other_half = LF_PLANTED("registers: high half first");
      if (LF_PLANTED("registers: one is not written") && i == 6) continue;
      a[LF_PLANTED("registers: the second and third change places") ? swapped : i / 2] =
          ptx::pack<T>(element(other_half ? k + 1 : k), element(other_half ? k : k + 1));
    }
    const bool fenced = !LF_PLANTED("registers: no fence") && !LF_PLANTED("registers: fence before they are written");
    if (fenced && !(LF_PLANTED("registers: fenced once") && step > 0)) ptx::wgmma_fence();
    const uint32_t place = ptx::shared_address(b) + step / 4 * kBoxBytes + step % 4 * (kMajor == Major::K ? 32 : 2048);
    const uint64_t of_b = descriptor(place, kDepth / 64 * kBoxBytes);
    if (LF_PLANTED("registers: one warp has a elsewhere") && warp == 3) {
      ptx::wgmma<T, N, kMajor>(d, descriptor(place, 16), of_b, step > 0);
    } else if (LF_PLANTED("registers: left before the wait")) {
      ptx::OperandRegister copy[4] = {a[0], a[1], a[2], a[3]};
      ptx::wgmma_fence();
      ptx::wgmma<T, N, kMajor>(d, copy, of_b, step > 0);
    } else {
      ptx::wgmma<T, N, kMajor>(d, a, of_b, step > 0);
    }
    ptx::wgmma_commit();
    if (LF_PLANTED("registers: read before the wait")) d[0] = static_cast<float>(a[0]);
    LF_PLANTED("registers: waits for one group too few") ? ptx::wgmma_wait<2>() : ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  for (int i = 0; i < N / 2; ++i) {
    const int m = tile + warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (m < p.m && n < p.n) ptx::store_global(p.d + m * p.n + n, d[i]);
  }
}

template <class T, int N, Major kMajor>
std::string run_registers() {
  const int m = 100, n = N - 8, k = kDepth - 24;
  static const std::vector<T> a = numbers<T>(m * k, 7), b = numbers<T>(n * k, 8);
  static const std::vector<double> expected = product(a, b, m, n, k, kMajor == Major::MN);
  std::vector<float> d(m * n, NAN);
  emu::forget_memory();
  emu::declare_memory(b.data(), b.size() * 2, "b");
  emu::declare_memory(d.data(), d.size() * 4, "d", true);
  const int64_t width = kMajor == Major::K ? k : n, height = kMajor == Major::K ? n : k;
  const auto map_b = encode_tensor_map<T, 2>(b.data(), {width, height}, {2 * width}, {64, 64});
  launch(registers_kernel<T, N, kMajor>, {ceil_div(m, 64), 128, 1024 + N * kDepth * 2 + 8}, nullptr, map_b,
         RegistersArguments<T>{m, n, k, a.data(), d.data()});
  if (emu::unwritten_words(d.data(), d.size() * 4) > 0) return "words of d are not written";
  return compare(d, expected, 1e-5);
}

}  // namespace

std::vector<Case> registers_cases() {
  const char* const fence = "without a wgmma_fence since a register of a was written";
  return {
      {"wgmma from registers", run_registers<BF16, 64, Major::K>,
       {{"registers: waits for one group too few", "was written while a wgmma that reads it has not been waited for"},
        {"registers: read before the wait", "was read while a wgmma that reads it has not been waited for"},
        {"registers: left before the wait", "was left while a wgmma that reads it has not been waited for"},
        {"registers: no fence", fence},
        {"registers: fenced once", fence},
        {"registers: fence before they are written", fence},
        {"registers: one is not written", "which nobody has written"},
        {"registers: the second and third change places", "wrong value"},
        {"registers: high half first", "wrong value"},
        {"registers: one warp has a elsewhere", "differ between the threads of the warpgroup"}}},
      {"wgmma from registers, MN-major", run_registers<FP16, 256, Major::MN>, {}},
  };
}

}  // namespace lorafuse::selftest

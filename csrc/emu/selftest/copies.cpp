// A ring whose rows of a are copied by threads and arrive at the mbarrier that counts TMA's bytes of b, for wgmma.
#include <lorafuse/ptx/copies.cuh>
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/wgmma.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using ptx::Major;
using ptx::TensorMap;

constexpr int kStages = 3, kTileM = 64, kTileN = 64, kTileK = 64, kThreads = 192, kCopiers = 64;
constexpr int kBytesA = kTileM * kTileK * 2, kBytesStage = kBytesA + kTileN * kTileK * 2;

template <class T>
struct CopiesArguments {
  int m, k;
  T* a;
  const int* rows;
  float* d;
};

// As the PTX manual gives it: written here once more, not taken from layout.cuh.
uint64_t descriptor(uint32_t address) {
  return (address >> 4) | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// d[m] = a[rows[m]] bᵀ: a [., K], b [64, K]. Warps 0 to 3 multiply, 4 and 5 load, a thread of them one row of a.
template <class T>
LF_KERNEL(kThreads)
copies_kernel(LF_GRID_CONSTANT TensorMap map_b, const CopiesArguments<T> p) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* ring = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(ring + kStages * kBytesStage);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1 + (LF_PLANTED("copies: half of the arrivals expected") ? kCopiers / 2 : kCopiers));
      ptx::mbarrier_init(empty + i, 4);
    }
    ptx::mbarrier_init_fence();
  }
  if (!LF_PLANTED("copies: no block_sync after init")) ptx::block_sync();
  const int steps = ceil_div(p.k, kTileK), tile = static_cast<int>(blockIdx.x) * kTileM;
  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  };
  if (threadIdx.x >= 128) {
    const int row = static_cast<int>(threadIdx.x) - 128, m = tile + row;
    T* const from = p.a + (m < p.m ? p.rows[m] : 0) * p.k;
    const bool leads = row < 32 && ptx::elect_one();
    for (int step = 0; step < steps; ++step) {
      if (!LF_PLANTED("copies: no wait for an empty stage")) ptx::mbarrier_wait(empty + stage, phase ^ 1);
      uint8_t* a = ring + stage * kBytesStage;
      if (leads) {
        ptx::mbarrier_arrive_expect(full + stage, kBytesStage - kBytesA);
        ptx::tma_load(a + kBytesA, &map_b, step * kTileK, 0, full + stage);
      }
      for (int piece = 0; piece < 8; ++piece) {
        const int k = step * kTileK + piece * 8;
        const int swizzled = LF_PLANTED("copies: pieces in order") ? piece : piece ^ row % 8;
        ptx::copy_async(a + row * 128 + swizzled * 16, from + k, m < p.m && k < p.k ? 16 : 0);
      }
      if (LF_PLANTED("copies: fenced by the thread that issues")) ptx::fence_proxy_async_shared();
      if (LF_PLANTED("copies: the thread arrives itself")) {
        ptx::mbarrier_arrive(full + stage);
      } else if (!LF_PLANTED("copies: the last do not arrive") || step + 1 < steps) {
        ptx::copy_async_arrive(full + stage);
      }
      if (LF_PLANTED("copies: source written while it is read") && m < p.m && step + 1 == steps) {
        ptx::store_global(from + step * kTileK, T{});
      }
      advance();
    }
    if (LF_PLANTED("copies: left behind")) ptx::copy_async(empty + kStages, p.a, 0);
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    float d[kTileN / 2];
    for (int step = 0; step < steps; ++step) {
      const bool late = LF_PLANTED("copies: fenced before the wait");
      if (late) ptx::fence_proxy_async_shared();
      if (!LF_PLANTED("copies: no wait for a full stage")) ptx::mbarrier_wait(full + stage, phase);
      if (!late && !LF_PLANTED("copies: no fence") && !LF_PLANTED("copies: fenced by the thread that issues") &&
          !(LF_PLANTED("copies: fenced once") && step > 0)) {
        ptx::fence_proxy_async_shared();
      }
      const uint32_t a = ptx::shared_address(ring + stage * kBytesStage), b = a + kBytesA;
      ptx::wgmma_fence();
      for (int j = 0; j < kTileK / 16; ++j) {
        ptx::wgmma<T, kTileN, Major::K>(d, descriptor(a + 32 * j), descriptor(b + 32 * j), step > 0 || j > 0);
      }
      ptx::wgmma_commit();
      if (!LF_PLANTED("copies: stage freed before the wait")) ptx::wgmma_wait<0>();
      if (lane == 0) ptx::mbarrier_arrive(empty + stage);
      ptx::wgmma_wait<0>();
      advance();
    }
    for (int i = 0; i < kTileN / 2; ++i) {
      const int m = tile + warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if (m < p.m) ptx::store_global(p.d + m * kTileN + n, d[i]);
    }
  }
}

template <class T>
std::string run_copies() {
  const int m = 100, k = 328, tokens = 101;
  std::vector<T> a = numbers<T>(tokens * k, 5);
  static const std::vector<T> b = numbers<T>(kTileN * k, 6);
  std::vector<int> rows(m);
  std::vector<double> expected(m * kTileN);
  for (int i = 0; i < m; ++i) {
    rows[i] = i * 7 % tokens;
    for (int j = 0; j < kTileN; ++j) {
      for (int l = 0; l < k; ++l) {
        expected[i * kTileN + j] += static_cast<double>(value_of(a[rows[i] * k + l])) * value_of(b[j * k + l]);
      }
    }
  }
  std::vector<float> d(m * kTileN, NAN);
  emu::forget_memory();
  emu::declare_memory(a.data(), a.size() * 2, "a");
  emu::declare_memory(b.data(), b.size() * 2, "b");
  emu::declare_memory(d.data(), d.size() * 4, "d", true);
  const auto map_b = encode_tensor_map<T, 2>(b.data(), {k, kTileN}, {2 * k}, {64, kTileN});
  launch(copies_kernel<T>, {ceil_div(m, kTileM), kThreads, 1024 + kStages * (kBytesStage + 16) + 16}, nullptr, map_b,
         CopiesArguments<T>{m, k, a.data(), rows.data(), d.data()});
  if (emu::unwritten_words(d.data(), d.size() * 4) > 0) return "words of d are not written";
  return compare(d, expected, 1e-5);
}

}  // namespace

std::vector<Case> copies_cases() {
  const char* const fence = "no fence_proxy_async_shared after the wait for it";
  return {{"copy_async and mbarrier",
           run_copies<BF16>,
           {
               {"copies: half of the arrivals expected", ""},
               {"copies: no block_sync after init", "initializ"},
               {"copies: no wait for an empty stage", ""},
               {"copies: pieces in order", "wrong value"},
               {"copies: fenced by the thread that issues", fence},
               {"copies: the thread arrives itself", "copy_async"},
               {"copies: the last do not arrive", "copy_async"},
               {"copies: source written while it is read", "not ordered after the read by asynchronous copies"},
               {"copies: left behind", "copy_async"},
               {"copies: fenced before the wait", fence},
               {"copies: no wait for a full stage", "wgmma reads shared memory"},
               {"copies: no fence", fence},
               {"copies: fenced once", fence},
               {"copies: stage freed before the wait", "while a wgmma or TMA store that reads it"},
           }}};
}

}  // namespace lorafuse::selftest

// A ring of stages that TMA fills and wgmma empties, b K-major or MN-major, alone and in a cluster of two that shares
// b.
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/wgmma.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using ptx::Major;
using ptx::TensorMap;

constexpr int kStages = 3, kTileM = 64, kTileK = 64, kThreads = 160;
constexpr int kBytesA = kTileM * kTileK * 2;

struct RingArguments {
  int m, n, k;
  float* d;
};

// As the PTX manual gives it: written here once more, not taken from layout.cuh.
uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, uint64_t swizzle) {
  return (address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         swizzle << 62;
}

// d = a b: a [M, K], b [N, K] or, MN-major, [K, N]; a block has 64 rows and all N columns. Warps 0 to 3 multiply, warp
// 4 loads.
template <class T, int N, Major kMajor, int kCluster>
LF_KERNEL(kThreads)
ring_kernel(LF_GRID_CONSTANT TensorMap map_a, LF_GRID_CONSTANT TensorMap map_b, const RingArguments p) {
  constexpr int kBytesB = (N < 64 && kMajor == Major::MN ? 64 : N) * kTileK * 2;
  constexpr int kBytesStage = kBytesA + kBytesB;
  LF_DYNAMIC_SHARED(raw);
  const uint32_t misaligned = ptx::shared_address(raw) % 1024;
  uint8_t* ring = raw + (LF_PLANTED("ring: not aligned to 1024") ? 0 : (1024 - misaligned) % 1024);
  uint64_t* full = reinterpret_cast<uint64_t*>(ring + kStages * kBytesStage);
  if (LF_PLANTED("ring: barriers inside the ring")) full -= 2;
  uint64_t* empty = full + kStages;
  const uint32_t rank = kCluster > 1 ? ptx::cluster_rank() : 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, LF_PLANTED("ring: too few arrivals expected") ? 2 : 4 * kCluster);
    }
    if (!LF_PLANTED("ring: no init fence")) ptx::mbarrier_init_fence();
  }
  if (kCluster > 1 && !LF_PLANTED("ring: block_sync for cluster_sync")) {
    ptx::cluster_sync();
  } else if (!LF_PLANTED("ring: no block_sync after init")) {
    ptx::block_sync();
  }
  const int steps = ceil_div(p.k, kTileK), row = static_cast<int>(blockIdx.x) * kTileM;
  int stage = 0;
  uint32_t phase = 0;
  const auto advance = [&] {
    if (++stage == kStages) {
      stage = 0;
      if (!LF_PLANTED("ring: parity never flips")) phase ^= 1;
    }
  };
  if (threadIdx.x >= 128) {
    if (ptx::elect_one()) {
      for (int step = 0; step < steps; ++step) {
        if (!LF_PLANTED("ring: no wait for an empty stage")) {
          if (kCluster > 1 && !LF_PLANTED("ring: block scope")) {
            ptx::mbarrier_wait_cluster(empty + stage, phase ^ 1);
          } else {
            ptx::mbarrier_wait(empty + stage, phase ^ 1);
          }
        }
        uint8_t* a = ring + stage * kBytesStage;
        uint8_t* b = a + kBytesA;
        ptx::mbarrier_arrive_expect(full + stage, kBytesStage - (LF_PLANTED("ring: expects too few bytes") ? 1024 : 0));
        ptx::tma_load(a, &map_a, step * kTileK, row, full + stage);
        const int x = kMajor == Major::K ? step * kTileK : 0, y = kMajor == Major::K ? 0 : step * kTileK;
        if constexpr (kCluster > 1) {
          constexpr int kRows = N / kCluster;
          ptx::tma_load_multicast(b + rank * kRows * 128, &map_b, x, y + static_cast<int>(rank) * kRows, full + stage,
                                  (1 << kCluster) - 1);
        } else if constexpr (kMajor == Major::K) {
          ptx::tma_load(b, &map_b, x, y, full + stage);
        } else {
          for (int n = 0; n < N; n += 64) ptx::tma_load(b + n * kTileK * 2, &map_b, n, y, full + stage);
        }
        advance();
      }
    }
  } else {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    const auto free_stage = [&](int s) {
      if (lane != 0) return;
      if constexpr (kCluster == 1) {
        ptx::mbarrier_arrive(empty + s);
      } else {
        for (int i = 0; i < kCluster; ++i) ptx::mbarrier_arrive_cluster(empty + s, i);
      }
    };
    float d[N / 2];
    int previous = -1;
    for (int step = 0; step < steps; ++step) {
      if (!LF_PLANTED("ring: no wait for a full stage")) ptx::mbarrier_wait(full + stage, phase);
      const uint32_t a = ptx::shared_address(ring + stage * kBytesStage), b = a + kBytesA;
      if (!LF_PLANTED("ring: no wgmma fence")) ptx::wgmma_fence();
      for (int j = 0; j < kTileK / 16; ++j) {
        const uint64_t swizzle = LF_PLANTED("ring: swizzle of 64 bytes") ? 2 : 1;
        const uint32_t stride = LF_PLANTED("ring: stride of 512 bytes") ? 512 : 1024;
        const uint64_t b_place = kMajor == Major::K ? descriptor(b + 32 * j, 16, stride, swizzle)
                                                    : descriptor(b + 2048 * j, kTileK * 128, stride, swizzle);
        const bool accumulate = step > 0 || j > 0 || LF_PLANTED("ring: accumulator not cleared");
        ptx::wgmma<T, N, kMajor>(d, descriptor(a + 32 * j, 16, 1024, 1), b_place, accumulate);
      }
      if (!LF_PLANTED("ring: no commit") || step + 1 < steps) ptx::wgmma_commit();
      if (LF_PLANTED("ring: registers touched in flight")) d[0] = 0;
      if (LF_PLANTED("ring: stage freed before the wait")) {
        free_stage(stage);
        ptx::wgmma_wait<0>();
      } else {
        ptx::wgmma_wait<1>();
        if (previous >= 0) free_stage(previous);
        previous = stage;
      }
      advance();
    }
    if (!LF_PLANTED("ring: no last wait")) ptx::wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) {
      const int m = row + warp * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
      if ((m < p.m || LF_PLANTED("ring: no row guard")) && n < p.n) ptx::store_global(p.d + m * p.n + n, d[i]);
    }
  }
  if (kCluster > 1 && !LF_PLANTED("ring: no cluster_sync at the end")) ptx::cluster_sync();
}

template <class T, int N, Major kMajor, int kCluster>
std::string run_ring() {
  const int m = 200, n = N > 16 ? N - 8 : N, k = 328;
  static const std::vector<T> a = numbers<T>(m * k, 1), b = numbers<T>(n * k, 2);
  static const std::vector<double> expected = product(a, b, m, n, k, kMajor == Major::MN);
  std::vector<float> d(m * n, NAN);
  emu::forget_memory();
  emu::declare_memory(a.data(), a.size() * 2, "a");
  emu::declare_memory(b.data(), b.size() * 2, "b");
  emu::declare_memory(d.data(), d.size() * 4, "d", true);
  const int64_t width = kMajor == Major::K ? k : n, height = kMajor == Major::K ? n : k;
  const auto map_a = encode_tensor_map<T, 2>(a.data(), {k, m}, {2 * k}, {64, kTileM});
  const int rows = kMajor == Major::K ? N / kCluster : kTileK;
  const auto map_b = encode_tensor_map<T, 2>(b.data(), {width, height}, {2 * width}, {64, rows});
  constexpr int kColumns = N < 64 && kMajor == Major::MN ? 64 : N;
  const int shared = 1024 + kStages * (kBytesA + kColumns * kTileK * 2) + 2 * kStages * 8;
  launch(ring_kernel<T, N, kMajor, kCluster>, {round_up(ceil_div(m, kTileM), kCluster), kThreads, shared, kCluster},
         nullptr, map_a, map_b, RingArguments{m, n, k, d.data()});
  if (emu::unwritten_words(d.data(), d.size() * 4) > 0) return "words of d are not written";
  return compare(d, expected, 1e-5);
}

}  // namespace

std::vector<Case> ring_cases() {
  const std::vector<Bug> bugs = {
      {"ring: not aligned to 1024", "the 128-byte swizzle repeats every 1024 bytes", 90},
      {"ring: barriers inside the ring", "wrote with no fence_proxy_async_shared"},
      {"ring: too few arrivals expected", "race: TMA load"},
      {"ring: no init fence", "no mbarrier_init_fence"},
      {"ring: no block_sync after init", "initializ"},
      {"ring: parity never flips", ""},
      {"ring: no wait for an empty stage", ""},
      {"ring: expects too few bytes", "lacks 0 of 1 arrivals and"},
      {"ring: no wait for a full stage", "wgmma reads shared memory"},
      {"ring: no wgmma fence", "wgmma without a wgmma_fence"},
      {"ring: swizzle of 64 bytes", "wrong value"},
      {"ring: stride of 512 bytes", ""},
      {"ring: accumulator not cleared", "wrong value"},
      {"ring: no commit", ""},
      {"ring: registers touched in flight", "was written while a wgmma on it was in flight"},
      {"ring: stage freed before the wait", "race: TMA load into"},
      {"ring: no last wait", ""},
      {"ring: no row guard", "outside of every declared buffer"},
  };
  const std::vector<Bug> cluster_bugs = {
      {"ring: block_sync for cluster_sync", "mbarrier"},
      {"ring: too few arrivals expected", "race: TMA load"},
      {"ring: no cluster_sync at the end", "has ended", 50},
      {"ring: block scope", "mbarrier_wait_cluster only"},
  };
  return {
      {"ring K-major", run_ring<BF16, 64, Major::K, 1>, bugs},
      {"ring K-major n256", run_ring<FP16, 256, Major::K, 1>, {}},
      {"ring K-major n16", run_ring<BF16, 16, Major::K, 1>, {}},
      {"ring MN-major", run_ring<BF16, 128, Major::MN, 1>, {{"ring: stride of 512 bytes", ""}}},
      {"ring MN-major n32", run_ring<FP16, 32, Major::MN, 1>, {}},
      {"ring in a cluster", run_ring<BF16, 128, Major::K, 2>, cluster_bugs},
  };
}

}  // namespace lorafuse::selftest

// stmatrix and TMA stores, with two buffers that are used in turn; a 3-D map; a store that other blocks read by TMA.
#include <lorafuse/ptx/convert.cuh>
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using ptx::TensorMap;

constexpr int kTiles = 5, kTileM = 64, kTileN = 64, kTileBytes = kTileM * kTileN * 2;

// Element (m, n) of tile i is the integer it writes: exact in BF16.
LF_HOST_DEVICE float element(int i, int m, int n) { return static_cast<float>((i * 37 + m * 3 + n) % 251); }

// y[M, kTiles · 64] of one block of four warps: every warp puts 16 rows of a tile into shared memory, one thread stores
// it.
LF_KERNEL(128) store_kernel(LF_GRID_CONSTANT TensorMap map_y) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* buffers = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int i = 0; i < kTiles; ++i) {
    uint8_t* buffer = buffers + i % 2 * kTileBytes;
    if (threadIdx.x == 0) {
      if (LF_PLANTED("store: waits for one group too few")) {
        ptx::tma_store_wait_read<2>();
      } else if (!LF_PLANTED("store: no wait for the read")) {
        ptx::tma_store_wait_read<1>();
      }
    }
    if (!LF_PLANTED("store: no barrier after the wait")) ptx::named_barrier_sync<1, 128>();
    for (int n = 0; n < kTileN; n += 16) {
      uint32_t values[4];
      for (int matrix = 0; matrix < 4; ++matrix) {
        const int m = warp * 16 + matrix % 2 * 8 + lane / 4, column = n + matrix / 2 * 8 + lane % 4 * 2;
        values[matrix] = ptx::pack<BF16>(element(i, m, column), element(i, m, column + 1));
      }
      const int row = warp * 16 + lane % 16, chunk = n / 8 + lane / 16;
      const int place = row * 128 + (LF_PLANTED("store: no swizzle") ? chunk : chunk ^ row % 8) * 16;
      ptx::stmatrix(buffer + place, values[0], values[1], values[2], values[3]);
    }
    if (!LF_PLANTED("store: no proxy fence") && !LF_PLANTED("store: fence after the barrier")) {
      if (!LF_PLANTED("store: fence by one lane") || lane == 0) ptx::fence_proxy_async_shared();
    }
    if (!LF_PLANTED("store: no barrier before the store")) ptx::named_barrier_sync<1, 128>();
    if (threadIdx.x == 0) {
      if (LF_PLANTED("store: fence after the barrier")) ptx::fence_proxy_async_shared();
      ptx::tma_store(&map_y, buffer, i * kTileN, 0);
      if (!LF_PLANTED("store: no commit")) ptx::tma_store_commit();
    }
  }
  if (threadIdx.x == 0 && !LF_PLANTED("store: no last wait")) ptx::tma_store_wait_read<0>();
}

std::string run_store() {
  // ragged: the last rows and columns of the last tile are outside
  const int m = 50, n = kTiles * kTileN - 24;
  std::vector<BF16> y((m + 1) * n, BF16{0x7fff});
  emu::forget_memory();
  emu::declare_memory(y.data(), m * n * 2, "y", true);
  const auto map = encode_tensor_map<BF16, 2>(y.data(), {n, m}, {2 * n}, {kTileN, kTileM});
  launch(store_kernel, {1, 128, 1024 + 2 * kTileBytes}, nullptr, map);
  if (emu::unwritten_words(y.data(), m * n * 2) > 0) return "words of y are not written";
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      const float expected = element(j / kTileN, i, j % kTileN), found = value_of(y[i * n + j]);
      if (found != expected) {
        return "wrong value at " + std::to_string(i) + ", " + std::to_string(j) + ": " + std::to_string(found);
      }
    }
  }
  for (int j = 0; j < n; ++j) {
    if (y[m * n + j].bits != 0x7fff) return "a row outside of the tensor was written";
  }
  return "";
}

struct PassArguments {
  uint32_t* flag;
};

// Block 0 writes a tile by TMA and tells the other, which reads it by TMA from a 3-D map and writes it elsewhere.
LF_KERNEL(32)
pass_kernel(LF_GRID_CONSTANT TensorMap map_to, LF_GRID_CONSTANT TensorMap map_from, LF_GRID_CONSTANT TensorMap map_y,
            const PassArguments p) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* tile = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(tile + kTileBytes);
  if (blockIdx.x == 0) {
    for (int i = static_cast<int>(threadIdx.x); i < kTileBytes / 4; i += 32) {
      const int m = i / 32, n = i % 32 * 2;
      const int place = m * 128 + ((n / 8 ^ m % 8) * 8 + n % 8) * 2;
      ptx::store_shared<uint32_t>(tile + place, ptx::pack<BF16>(element(1, m, n), element(1, m, n + 1)));
    }
    ptx::fence_proxy_async_shared();
    ptx::warp_sync();
    if (ptx::elect_one()) {
      ptx::tma_store(&map_to, tile, 0, 0);
      ptx::tma_store_commit();
      if (LF_PLANTED("pass: waits for the read only")) {
        ptx::tma_store_wait_read<0>();
      } else {
        ptx::tma_store_wait<0>();
      }
      ptx::add_release(p.flag, 1);
    }
    return;
  }
  if (ptx::elect_one()) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    if (!LF_PLANTED("pass: no wait for the flag")) ptx::wait_at_least(p.flag, 1);
    ptx::fence_proxy_async();
    ptx::mbarrier_arrive_expect(full, kTileBytes);
    ptx::tma_load(tile, &map_from, 0, 0, 1, full);
    ptx::mbarrier_wait(full, 0);
    ptx::tma_store(&map_y, tile, 0, 0);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
    ptx::store_relaxed(p.flag, 0);
  }
}

std::string run_pass() {
  // three matrices of 40 rows; the one between is written and read
  const int rows = 40, columns = 56;
  std::vector<BF16> from(3 * rows * columns), y(rows * columns, BF16{0x7fff});
  uint32_t flag = 0;
  emu::forget_memory();
  BF16* middle = from.data() + rows * columns;
  const auto map_to = encode_tensor_map<BF16, 2>(middle, {columns, rows}, {2 * columns}, {kTileN, kTileM});
  const auto map_from = encode_tensor_map<BF16, 3>(from.data(), {columns, rows, 3}, {2 * columns, 2 * columns * rows},
                                            {kTileN, kTileM, 1});
  const auto map_y = encode_tensor_map<BF16, 2>(y.data(), {columns, rows}, {2 * columns}, {kTileN, kTileM});
  launch(pass_kernel, {2, 32, 1024 + kTileBytes + 8}, nullptr, map_to, map_from, map_y, PassArguments{&flag});
  for (int i = 0; i < rows * columns; ++i) {
    if (value_of(y[i]) != element(1, i / columns, i % columns)) return "wrong value at " + std::to_string(i);
  }
  return flag == 0 ? "" : "the flag was not reset";
}

}  // namespace

std::vector<Case> store_cases() {
  const char* not_read = "while a wgmma or TMA store that reads it has not been waited for";
  return {
      {"TMA store", run_store,
       {{"store: no wait for the read", not_read},
        {"store: waits for one group too few", not_read},
        {"store: no barrier after the wait", "race: write of shared memory", 90},
        {"store: no swizzle", "wrong value"},
        {"store: no proxy fence", "with no fence_proxy_async_shared"},
        {"store: fence by one lane", "with no fence_proxy_async_shared"},
        {"store: fence after the barrier", "with no fence_proxy_async_shared"},
        {"store: no barrier before the store", "TMA store reads shared memory"},
        {"store: no commit", ""},
        {"store: no last wait", "tma_store_wait_read is missing"}}},
      {"TMA store to TMA load", run_pass,
       {{"pass: waits for the read only", "has not been waited for"}, {"pass: no wait for the flag", "race: ", 50}}},
  };
}

}  // namespace lorafuse::selftest

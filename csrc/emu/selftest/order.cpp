// What blocks and launches tell each other: flags, tickets, words and sums of a cluster, launches that overlap.
#include <lorafuse/ptx/cluster.cuh>
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using ptx::TensorMap;

constexpr int kRows = 64, kColumns = 64, kTileBytes = kRows * kColumns * 2;

struct FlagArguments {
  BF16* s;
  BF16* y;
  uint32_t* flags;
  bool by_tma;
};

// Blocks 0 and 1 write 32 rows of s each, blocks 2 and 3 wait for both and read all of it, by TMA or by ordinary loads.
// The last reader resets the flags.
LF_KERNEL(64) flag_kernel(LF_GRID_CONSTANT TensorMap map_s, LF_GRID_CONSTANT TensorMap map_y, const FlagArguments p) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* tile = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(tile + kTileBytes);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  if (block < 2) {
    for (int i = thread; i < 32 * kColumns; i += 64) {
      ptx::store_global(p.s + block * 32 * kColumns + i, BF16{static_cast<uint16_t>(block * 7 + i)});
    }
    if (LF_PLANTED("flag: fence by the writer")) ptx::fence_proxy_async();
    if (!LF_PLANTED("flag: no barrier before it")) ptx::block_sync();
    if (thread == 0) {
      LF_PLANTED("flag: relaxed") ? ptx::add_relaxed(p.flags, 1) : ptx::add_release(p.flags, 1);
    }
    return;
  }
  BF16* y = p.y + (block - 2) * kRows * kColumns;
  if (p.by_tma) {
    if (thread != 0) return;
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    if (!LF_PLANTED("flag: no wait")) ptx::wait_at_least(p.flags, LF_PLANTED("flag: one too few") ? 1 : 2);
    if (!LF_PLANTED("flag: no proxy fence") && !LF_PLANTED("flag: fence by the writer")) ptx::fence_proxy_async();
    ptx::mbarrier_arrive_expect(full, kTileBytes);
    ptx::tma_load(tile, &map_s, 0, 0, full);
    ptx::mbarrier_wait(full, 0);
    ptx::tma_store(&map_y, tile, 0, (block - 2) * kRows);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  } else {
    if (thread == 0 && !LF_PLANTED("flag: no wait")) ptx::wait_at_least(p.flags, 2);
    if (!LF_PLANTED("flag: no barrier after it")) ptx::block_sync();
    for (int i = thread; i < kRows * kColumns; i += 64) ptx::store_global(y + i, ptx::load_global(p.s + i));
    ptx::block_sync();
  }
  if (thread == 0 && !LF_PLANTED("flag: no reset") && ptx::fetch_add_acquire_release(p.flags + 1, 1) == 1) {
    ptx::store_relaxed(p.flags, 0);
    ptx::store_relaxed(p.flags + 1, 0);
  }
}

template <bool kByTma>
std::string run_flag() {
  std::vector<BF16> s(kRows * kColumns), y(2 * kRows * kColumns);
  uint32_t flags[2] = {};
  emu::forget_memory();
  emu::declare_memory(s.data(), s.size() * 2, "s", true);
  emu::declare_memory(y.data(), y.size() * 2, "y", true);
  const auto map_s = encode_tensor_map<BF16, 2>(s.data(), {kColumns, kRows}, {2 * kColumns}, {kColumns, kRows});
  const auto map_y = encode_tensor_map<BF16, 2>(y.data(), {kColumns, 2 * kRows}, {2 * kColumns}, {kColumns, kRows});
  // twice: flags must be as they were
  for (int launches = 0; launches < 2; ++launches) {
    launch(flag_kernel, {4, 64, 1024 + kTileBytes + 8}, nullptr, map_s, map_y,
           FlagArguments{s.data(), y.data(), flags, kByTma});
    for (int i = 0; i < 2 * kRows * kColumns; ++i) {
      const int at = i % (kRows * kColumns), block = at / (32 * kColumns);
      if (y[i].bits != block * 7 + at % (32 * kColumns)) return "wrong value at " + std::to_string(i);
    }
  }
  return "";
}

struct TicketArguments {
  float* partial;
  float* sum;
  uint32_t* ticket;
  int blocks;
};

// Every block writes 64 partial sums; the one that draws the last ticket adds them in the order of the blocks.
LF_KERNEL(64) ticket_kernel(const TicketArguments p) {
  LF_DYNAMIC_SHARED(raw);
  uint32_t* last = reinterpret_cast<uint32_t*>(raw);
  const int thread = static_cast<int>(threadIdx.x), block = static_cast<int>(blockIdx.x);
  ptx::store_global(p.partial + block * 64 + thread, static_cast<float>(block + thread));
  if (!LF_PLANTED("ticket: no barrier before it")) ptx::block_sync();
  if (thread == 0) {
    const uint32_t ticket = LF_PLANTED("ticket: relaxed") ? ptx::fetch_add_relaxed(p.ticket, 1)
                                                          : ptx::fetch_add_acquire_release(p.ticket, 1);
    ptx::store_shared<uint32_t>(last, ticket + 1 == static_cast<uint32_t>(p.blocks));
  }
  if (!LF_PLANTED("ticket: no barrier after it")) ptx::block_sync();
  if (!ptx::load_shared<uint32_t>(last)) return;
  float sum = 0;
  for (int b = 0; b < p.blocks; ++b) sum += ptx::load_global(p.partial + b * 64 + thread);
  ptx::store_global(p.sum + thread, sum);
  if (thread == 0) ptx::store_relaxed(p.ticket, 0);
}

std::string run_ticket() {
  const int blocks = 7;
  std::vector<float> partial(blocks * 64), sum(64);
  uint32_t ticket = 0;
  emu::forget_memory();
  launch(ticket_kernel, {blocks, 64, 16}, nullptr, TicketArguments{partial.data(), sum.data(), &ticket, blocks});
  std::vector<double> expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = blocks * (i + (blocks - 1) / 2);
  return compare(sum, expected, 0);
}

// Block 0 of a cluster tells the others a number.
LF_KERNEL(32) cluster_kernel(uint32_t* out) {
  LF_DYNAMIC_SHARED(raw);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(raw);
  uint32_t* word = reinterpret_cast<uint32_t*>(barrier + 1);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
  }
  if (!LF_PLANTED("cluster: no sync before the store")) ptx::cluster_sync();
  if (threadIdx.x == 0) ptx::mbarrier_arrive_expect(barrier, LF_PLANTED("cluster: half expected") ? 2 : 4);
  if (ptx::cluster_rank() == 0 && threadIdx.x < 4) {
    ptx::store_async(word, threadIdx.x, 100 + blockIdx.x, barrier);
  }
  if (threadIdx.x == 0) {
    if (!LF_PLANTED("cluster: no wait for the word")) ptx::mbarrier_wait(barrier, 0);
    ptx::store_global(out + blockIdx.x, ptx::load_shared<uint32_t>(word));
  }
  ptx::cluster_sync();
}

std::string run_cluster() {
  std::vector<uint32_t> out(8);
  emu::forget_memory();
  launch(cluster_kernel, {8, 32, 16, 4}, nullptr, out.data());
  for (uint32_t i = 0; i < 8; ++i) {
    if (out[i] != 100 + i / 4 * 4) return "wrong value at " + std::to_string(i);
  }
  return "";
}

// Every block of a cluster adds up the numbers of all of them.
LF_KERNEL(32) cluster_sum_kernel(float* out) {
  LF_DYNAMIC_SHARED(raw);
  float* number = reinterpret_cast<float*>(raw);
  if (threadIdx.x == 0) ptx::store_shared(number, static_cast<float>(blockIdx.x + 1));
  if (!LF_PLANTED("cluster sum: no sync before the loads")) ptx::cluster_sync();
  float sum = 0;
  const uint32_t blocks = LF_PLANTED("cluster sum: one block too many") ? 5 : 4;
  for (uint32_t rank = 0; rank < blocks && threadIdx.x == 0; ++rank) {
    const bool own = LF_PLANTED("cluster sum: its own number");
    sum += own ? ptx::load_shared<float>(number) : ptx::load_cluster(number, rank);
  }
  if (LF_PLANTED("cluster sum: changed while it is read") && threadIdx.x == 0) ptx::store_shared(number, 0.0f);
  if (!LF_PLANTED("cluster sum: ends while it is read")) ptx::cluster_sync();
  if (threadIdx.x == 0) ptx::store_global(out + blockIdx.x, sum);
}

std::string run_cluster_sum() {
  std::vector<float> out(8);
  emu::forget_memory();
  launch(cluster_sum_kernel, {8, 32, 16, 4}, nullptr, out.data());
  return compare(out, {10, 10, 10, 10, 26, 26, 26, 26}, 0);
}

LF_KERNEL(32) first_kernel(float* between, uint32_t* counter) {
  ptx::let_next_launch_start();
  ptx::store_global(between + threadIdx.x, static_cast<float>(threadIdx.x));
  if (threadIdx.x == 0) ptx::add_relaxed(counter, 1);
}

LF_KERNEL(64) second_kernel(const float* between, float* out, uint32_t* counter) {
  if (threadIdx.x == 0 && LF_PLANTED("overlap: counter before the wait")) ptx::store_relaxed(counter, 0);
  if (threadIdx.x == 0 && !LF_PLANTED("overlap: no wait")) ptx::wait_for_previous_launch();
  if (!LF_PLANTED("overlap: no barrier after the wait")) ptx::block_sync();
  ptx::store_global(out + threadIdx.x, ptx::load_global(between + threadIdx.x % 32));
  if (threadIdx.x == 0) ptx::store_relaxed(counter, 0);
}

std::string run_overlap() {
  std::vector<float> between(32), out(64);
  uint32_t counter = 0;
  emu::forget_memory();
  const LaunchConfig second{1, 64, 0, 1, true};
  // the third launch overlaps the second, which writes what it writes
  launch(first_kernel, {1, 32}, nullptr, between.data(), &counter);
  launch(second_kernel, second, nullptr, between.data(), out.data(), &counter);
  launch(second_kernel, second, nullptr, between.data(), out.data(), &counter);
  for (int i = 0; i < 64; ++i) {
    if (out[i] != static_cast<float>(i % 32)) return "wrong value at " + std::to_string(i);
  }
  return "";
}

}  // namespace

std::vector<Case> order_cases() {
  return {
      {"flag to TMA", run_flag<true>,
       {{"flag: no wait", "TMA load of s", 50},
        {"flag: one too few", "TMA load of s", 30},
        {"flag: relaxed", "race: TMA load of s"},
        {"flag: no barrier before it", "TMA load of s"},
        {"flag: no proxy fence", "without a fence_proxy_async between"},
        {"flag: no reset", "race: ", 50}}},
      {"flag to loads", run_flag<false>,
       {{"flag: no wait", "read of s", 50},
        {"flag: relaxed", "race: read of s"},
        {"flag: no barrier after it", "read of s"},
        {"flag: no reset", "race: ", 50}}},
      {"ticket", run_ticket,
       {{"ticket: relaxed", "race: read of"},
        {"ticket: no barrier before it", "race: read of"},
        {"ticket: no barrier after it", "shared memory"}}},
      {"words of a cluster", run_cluster,
       {{"cluster: no wait for the word", "shared memory", 90},
        {"cluster: half expected", "deadlock"},
        {"cluster: no sync before the store", "may not have started"}}},
      {"loads from a cluster", run_cluster_sum,
       {{"cluster sum: no sync before the loads", "shared memory"},
        {"cluster sum: one block too many", "of a cluster of 4"},
        {"cluster sum: its own number", "wrong value"},
        {"cluster sum: changed while it is read", "shared memory"},
        {"cluster sum: ends while it is read", "has ended", 50}}},
      {"launches that overlap", run_overlap,
       {{"overlap: no wait", "the launch before"},
        {"overlap: no barrier after the wait", "the launch before"},
        {"overlap: counter before the wait", "the launch before"}}},
  };
}

}  // namespace lorafuse::selftest

// mbarriers, the barriers of a block and of a cluster.
#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace lorafuse::emu {
namespace {

// What the 8 bytes of an initialized mbarrier hold: this and its number in the block.
constexpr uint64_t kTag = 0x6d62'6172'0000'0000;

Block& own_block() { return *current->block; }

void complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.expected;
  barrier.completed = barrier.arrived;
  engine->wake(barrier.waiting);
}

void count_arrival(const Block& block, Mbarrier& barrier) {
  if (barrier.pending == 0) {
    fail("more arrivals at the mbarrier at ", describe_shared(block, barrier.address), " than its ", barrier.expected,
         ", in phase ", barrier.phase);
  }
  --barrier.pending;
  complete_phase(barrier);
}

void arrive(Block& block, uint32_t address, uint32_t bytes) {
  Thread& thread = *current;
  if (block.exited) fail("arrival at an mbarrier of block ", block.number, ", which has ended");
  Mbarrier& barrier = mbarrier_at(block, address);
  check_init(thread, block, barrier);
  if (&block != thread.block) barrier.remote = true;
  release(thread, barrier.arrived);
  barrier.bytes += bytes;
  count_arrival(block, barrier);
}

// Everyone who is still running has arrived.
void complete(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  barrier.completed = barrier.joined;
  barrier.joined.reset(engine->clusters[static_cast<size_t>(current->block->cluster->number)]->first_agent,
                       engine->agents_per_cluster);
  engine->wake(barrier.waiting);
}

// barrier.sync and barrier.cluster, thread by thread.
void arrive_and_wait(Barrier& barrier, int count, const Waiting& waiting) {
  maybe_yield();
  Thread& thread = *current;
  release(thread, barrier.joined);
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == count) {
    complete(barrier);
  } else {
    while (barrier.generation == generation) wait_in(barrier.waiting, waiting);
  }
  thread.clock.join(barrier.completed);
}

}  // namespace

Mbarrier& mbarrier_at(Block& block, uint32_t address) {
  if (address % 8 != 0 || address < block.begin || address + 8 > block.end) {
    fail("mbarrier at shared address ", hex(address), ", which is not in the block's memory, ", hex(block.begin),
         " to ", hex(block.end), ", or not on an 8-byte boundary");
  }
  uint64_t word;
  std::memcpy(&word, block.window + address, 8);
  const uint64_t number = word - kTag;
  if (number >= block.mbarriers.size() || block.mbarriers[number].address != address) {
    fail("the mbarrier at ", describe_shared(block, address), " was not initialized, or was overwritten");
  }
  return block.mbarriers[number];
}

void check_init(const Thread& thread, const Block& block, const Mbarrier& barrier) {
  if (checks() && !ordered_after(thread, barrier.init)) {
    fail("race: use of the mbarrier at ", describe_shared(block, barrier.address),
         " is not ordered after its initialization by ", describe(barrier.init));
  }
}

void check_mbarrier_for_tma(const Thread& thread, Block& block, uint32_t address) {
  const Mbarrier& barrier = mbarrier_at(block, address);
  check_init(thread, block, barrier);
  if (checks() && !barrier.fenced) {
    fail("the mbarrier at ", describe_shared(block, address),
         " is used by TMA with no mbarrier_init_fence after its initialization");
  }
}

void complete_bytes(Mbarrier& barrier, uint32_t time, int64_t bytes) {
  barrier.arrived.raise(barrier.agent, time);
  barrier.bytes -= bytes;
  complete_phase(barrier);
}

void complete_copies(Block& block, Mbarrier& barrier, uint32_t time) {
  barrier.arrived.raise(barrier.agent, time);
  count_arrival(block, barrier);
}

// A thread of the block has ended: those who wait for all are fewer.
void arrive_exited(Block& block) {
  Barrier& of_block = block.barriers[0];
  if (of_block.arrived > 0 && of_block.arrived == block.live) complete(of_block);
  Cluster& cluster = *block.cluster;
  if (cluster.barrier.arrived > 0 && cluster.barrier.arrived == cluster.live) complete(cluster.barrier);
}

uint32_t shared_address(const void* p) {
  const Block& block = own_block();
  const auto* byte = static_cast<const uint8_t*>(p);
  if (byte < block.window || byte > block.window + block.end) {
    fail("a pointer that is not to this block's shared memory");
  }
  return static_cast<uint32_t>(byte - block.window);
}

void mbarrier_init(uint64_t* word, uint32_t arrivals) {
  Thread& thread = *current;
  Block& block = own_block();
  const uint32_t address = shared_address(word);
  if (address % 8 != 0 || address < block.begin || address + 8 > block.end) {
    fail("mbarrier_init at shared address ", hex(address),
         ", outside of the block's memory or not on an 8-byte boundary");
  }
  if (block.mbarriers.size() == kMaxMbarriers) fail("the emulator knows ", kMaxMbarriers, " mbarriers a block");
  if (arrivals == 0 || arrivals >= 1u << 20) fail("mbarrier_init with ", arrivals, " arrivals");
  block.shadow->write(thread, address, 8, access_of(thread));
  const uint64_t tagged = kTag + block.mbarriers.size();
  std::memcpy(word, &tagged, 8);
  Mbarrier barrier{};
  barrier.address = address;
  barrier.agent = block.warps[0]->agent + static_cast<Agent>(block.warps.size() + block.mbarriers.size());
  barrier.expected = barrier.pending = static_cast<int>(arrivals);
  barrier.init = access_of(thread);
  barrier.arrived.reset(block.cluster->first_agent, engine->agents_per_cluster);
  barrier.completed = barrier.arrived;
  block.mbarriers.push_back(std::move(barrier));
}

void mbarrier_init_fence() {
  for (Mbarrier& barrier : own_block().mbarriers) {
    if (barrier.init.agent == current->warp->agent && barrier.init.lane == current->lane) barrier.fenced = true;
  }
}

void mbarrier_arrive(uint64_t* barrier, uint32_t bytes) {
  maybe_yield();
  arrive(own_block(), shared_address(barrier), bytes);
}

void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
  maybe_yield();
  const auto& blocks = own_block().cluster->blocks;
  if (rank >= blocks.size()) fail("arrival at block ", rank, " of a cluster of ", blocks.size());
  arrive(*blocks[rank], shared_address(barrier), 0);
}

void mbarrier_wait(uint64_t* word, uint32_t parity, bool cluster_scope) {
  maybe_yield();
  Thread& thread = *current;
  const uint32_t address = shared_address(word);
  if (parity > 1) fail("mbarrier_wait with parity ", parity);
  Mbarrier& barrier = mbarrier_at(own_block(), address);
  check_init(thread, own_block(), barrier);
  while ((barrier.phase & 1) == parity) wait_in(barrier.waiting, {Waiting::kMbarrier, address, parity, nullptr});
  if (checks() && barrier.remote && !cluster_scope) {
    fail("mbarrier_wait at ", describe_shared(own_block(), address),
         ", where threads of other blocks arrive: they are seen by mbarrier_wait_cluster only");
  }
  thread.clock.join(barrier.completed);
}

// bar.sync, which counts whole warps.
void named_barrier_sync(int number, int threads) {
  Block& block = own_block();
  if (threads > static_cast<int>(block.threads.size())) {
    fail("barrier ", number, " of ", threads, " threads in a block of ", block.threads.size());
  }
  Barrier& barrier = block.barriers[static_cast<size_t>(number)];
  struct Slot {
    Thread* thread;
    int number;
    uint64_t generation;
  } slot{current, number, 0};
  rendezvous("named_barrier_sync", &slot, [&](const std::array<void*, 32>& slots) {
    if (barrier.arrived == 0) barrier.count = threads;
    if (barrier.count != threads) {
      fail("barrier ", number, " is used by ", threads, " threads while ", barrier.count, " threads meet there");
    }
    for (void* lane : slots) {
      Slot& other = *static_cast<Slot*>(lane);
      if (other.number != number) fail("lanes of a warp at barriers ", number, " and ", other.number);
      other.generation = barrier.generation;
      release(*other.thread, barrier.joined);
    }
    barrier.arrived += 32;
    if (barrier.arrived >= threads) complete(barrier);
  });
  const Waiting waiting{Waiting::kNamedBarrier, static_cast<uint64_t>(number), static_cast<uint64_t>(threads), nullptr};
  while (barrier.generation == slot.generation) wait_in(barrier.waiting, waiting);
  current->clock.join(barrier.completed);
}

void block_sync() {
  arrive_and_wait(own_block().barriers[0], own_block().live, {Waiting::kNamedBarrier, 0,
                  static_cast<uint64_t>(own_block().live), nullptr});
}

void cluster_sync() {
  Cluster& cluster = *own_block().cluster;
  arrive_and_wait(cluster.barrier, cluster.live, {Waiting::kCluster, 0, static_cast<uint64_t>(cluster.live), nullptr});
  current->cluster_clock = current->clock;
}

uint32_t cluster_rank() { return own_block().rank; }

}  // namespace lorafuse::emu

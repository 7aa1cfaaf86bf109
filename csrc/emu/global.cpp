// Ordinary memory, counters, and launches that overlap.
#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace lorafuse::emu {
namespace {

void check_counter(const void* counter) {
  if (reinterpret_cast<uintptr_t>(counter) % 4 != 0) fail("a counter that is not on a 4-byte boundary");
  if (checks() && !current->clock.previous() && engine->shape.overlap_previous && previous_counters.contains(counter)) {
    fail("race: the counter at ", describe_global(counter),
         " was used by the launch before, which wait_for_previous_launch has not waited for");
  }
}

}  // namespace

namespace {

void check_alignment(const void* p, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) {
    fail(what, " of ", describe_global(p), ", which is not on a ", alignment, "-byte boundary");
  }
}

}  // namespace

void global_read(const void* p, size_t bytes, size_t alignment) {
  Thread& thread = *current;
  check_alignment(p, alignment, "read");
  global_shadow.read(thread, p, bytes, Proxy::kGeneric, access_of(thread));
}

void global_write(void* p, size_t bytes, size_t alignment) {
  Thread& thread = *current;
  check_alignment(p, alignment, "write");
  if (engine->random.below(64) == 0) yield();
  global_shadow.write(thread, p, bytes, access_of(thread));
}

uint32_t checked_shared(const void* p, size_t bytes, size_t alignment, const char* what) {
  const uint32_t address = shared_address(p);
  const Block& block = *current->block;
  if (address < block.begin || address + bytes > block.end || address % alignment != 0) {
    fail(what, " of ", bytes, " bytes at shared address ", hex(address), ", which is misaligned or leaves ",
         hex(block.begin), " to ", hex(block.end));
  }
  return address;
}

void shared_read(const void* p, size_t bytes, size_t alignment) {
  if (engine->random.below(16) == 0) yield();
  const uint32_t address = checked_shared(p, bytes, alignment, "read");
  current->block->shadow->read(*current, address, static_cast<uint32_t>(bytes));
}

void shared_write(void* p, size_t bytes, size_t alignment) {
  if (engine->random.below(16) == 0) yield();
  const uint32_t address = checked_shared(p, bytes, alignment, "write");
  current->block->shadow->write(*current, address, static_cast<uint32_t>(bytes), access_of(*current));
}

namespace {

bool has_heard_of(const Thread& thread, const Block& block) {
  return std::any_of(block.warps.begin(), block.warps.end(),
                     [&](const auto& warp) { return thread.clock.at(warp->agent) > 0; });
}

}  // namespace

void store_async(uint32_t* word, uint32_t rank, uint32_t value, uint64_t* barrier) {
  maybe_yield();
  Thread& thread = *current;
  const auto& blocks = thread.block->cluster->blocks;
  if (rank >= blocks.size()) fail("store to block ", rank, " of a cluster of ", blocks.size());
  Block& block = *blocks[rank];
  if (block.exited) fail("store to the shared memory of block ", block.number, ", which has ended");
  if (checks() && &block != thread.block && !has_heard_of(thread, block)) {
    fail("store to the shared memory of block ", block.number, ", which may not have started: cluster_sync is missing");
  }
  const uint32_t address = checked_shared(word, 4, 4, "write"), counted = shared_address(barrier);
  check_mbarrier_for_tma(thread, block, counted);
  // whoever has waited for the mbarrier knows of the word, and of nothing else that this thread has done
  Mbarrier& counting = mbarrier_at(block, counted);
  Access access;
  access.time = ++counting.copies;
  access.agent = counting.agent;
  block.shadow->write(thread, address, 4, access);
  std::memcpy(block.window + address, &value, 4);
  complete_bytes(counting, access.time, 4);
}

float load_cluster(const float* p, uint32_t rank) {
  if (engine->random.below(16) == 0) yield();
  Thread& thread = *current;
  const auto& blocks = thread.block->cluster->blocks;
  if (rank >= blocks.size()) fail("load from block ", rank, " of a cluster of ", blocks.size());
  const Block& block = *blocks[rank];
  if (block.exited) fail("load from the shared memory of block ", block.number, ", which has ended");
  const uint32_t address = checked_shared(p, 4, 4, "read");
  block.shadow->read(thread, address, 4);
  float value;
  std::memcpy(&value, block.window + address, 4);
  return value;
}

uint32_t fetch_add(uint32_t* counter, uint32_t value, Order order) {
  maybe_yield();
  check_counter(counter);
  Thread& thread = *current;
  Flag& flag = engine->flags[counter];
  if (order == Order::kAcquireRelease) thread.clock.join(flag.times);
  if (order != Order::kRelaxed) {
    Clock released = thread.clock;
    released.raise(thread.warp->agent, thread.warp->time);
    released.publish(flag.times, engine->agents);
    tick(thread);
  }
  const uint32_t before = *counter;
  *counter = before + value;
  engine->wake(flag.waiting);
  return before;
}

void store_relaxed(uint32_t* counter, uint32_t value) {
  maybe_yield();
  check_counter(counter);
  Flag& flag = engine->flags[counter];
  // ends the release sequence of what was added before
  flag.times = {};
  *counter = value;
  engine->wake(flag.waiting);
}

void wait_at_least(const uint32_t* counter, uint32_t value) {
  maybe_yield();
  check_counter(counter);
  Flag& flag = engine->flags[counter];
  while (*counter < value) {
    wait_in(flag.waiting, {Waiting::kFlag, reinterpret_cast<uintptr_t>(counter), value, nullptr});
  }
  current->clock.join(flag.times);
}

void wait_for_previous_launch() {
  maybe_yield();
  engine->waited_for_previous = true;
  current->clock.learn_previous();
}

}  // namespace lorafuse::emu

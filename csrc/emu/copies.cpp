// Copies of 16 bytes that threads issue (cp.async): those of a thread's groups, which it waits for itself, and those that
// arrive at an mbarrier.
//
// A copy may read global memory and write shared memory at any time between its issue and what completes it: either at
// once or as late as that, by a draw. Whoever reads the place before is reported, whatever the draw.
#include <cstring>

#include "engine.hpp"

namespace lorafuse::emu {
namespace {

void land(const Block& block, const AsyncCopy& copy) {
  if (copy.moved) return;
  uint8_t* to = block.window + copy.shared;
  std::memset(to, 0, 16);
  if (copy.bytes > 0) std::memcpy(to, copy.global, static_cast<size_t>(copy.bytes));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes) {
  Thread& thread = *current;
  const uint32_t address = checked_shared(shared, 16, 16, "copy_async");
  if (bytes < 0 || bytes > 16) fail("copy_async of ", bytes, " bytes");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fail("copy_async from ", describe_global(global), ", which is not on a 16-byte boundary");
  }
  if (bytes > 0) {
    global_shadow.read(thread, global, static_cast<size_t>(bytes), Proxy::kGeneric, access_of(thread));
  }
  Access access = access_of(thread);
  access.state = Access::kInFlight;
  thread.block->shadow->write(thread, address, 16, access);
  AsyncCopy copy{address, global, bytes, false};
  if (engine->random.chance(50)) {
    land(*thread.block, copy);
    copy.moved = true;
  } else {
    // what is read too early is no number
    std::memset(thread.block->window + address, 0xff, 16);
  }
  thread.copies.back().push_back(copy);
}

void copy_async_commit() { current->copies.emplace_back(); }

void copy_async_wait(int pending) {
  maybe_yield();
  Thread& thread = *current;
  while (static_cast<int>(thread.copies.size()) - 1 > pending) {
    for (const AsyncCopy& copy : thread.copies.front()) {
      land(*thread.block, copy);
      thread.block->shadow->retire_copy(access_of(thread), copy.shared, 16);
    }
    thread.copies.erase(thread.copies.begin());
  }
}

// cp.async.mbarrier.arrive.noinc: all copies of the thread that nothing has completed arrive once, together, when they
// have landed. That tells of them and of nothing else that the thread did. Arrivals of one thread happen in any order,
// which is more than hardware does: a later one there waits for the copies of the earlier ones too.
void copy_async_arrive(uint64_t* word) {
  maybe_yield();
  Thread& thread = *current;
  Block& block = *thread.block;
  CopyArrival arrival{{}, &block, shared_address(word), 0};
  Mbarrier& barrier = mbarrier_at(block, arrival.barrier);
  check_init(thread, block, barrier);
  arrival.time = ++barrier.copies;
  Access access;
  access.time = arrival.time;
  access.agent = barrier.agent;
  for (const auto& group : thread.copies) {
    for (const AsyncCopy& copy : group) {
      // read until then
      if (copy.bytes > 0) {
        global_shadow.read(thread, copy.global, static_cast<size_t>(copy.bytes), Proxy::kGeneric, access);
      }
      arrival.copies.push_back(copy);
    }
  }
  thread.copies.assign(1, {});
  ++block.loads_in_flight;
  engine->copy_arrivals.push_back(std::move(arrival));
}

void run_copy_arrival(size_t i) {
  auto& arrivals = engine->copy_arrivals;
  const CopyArrival arrival = std::move(arrivals[i]);
  if (i + 1 < arrivals.size()) arrivals[i] = std::move(arrivals.back());
  arrivals.pop_back();
  Block& block = *arrival.block;
  Mbarrier& barrier = mbarrier_at(block, arrival.barrier);
  Access access;
  access.time = arrival.time;
  access.agent = barrier.agent;
  for (const AsyncCopy& copy : arrival.copies) {
    land(block, copy);
    block.shadow->retire_copy(access, copy.shared, 16);
  }
  --block.loads_in_flight;
  complete_copies(block, barrier, arrival.time);
}

}  // namespace lorafuse::emu

#include "tma.hpp"

#include <algorithm>
#include <cstring>

#include "engine.hpp"

namespace lorafuse::emu {
namespace {

void check_place(const Block& block, uint32_t shared, const Box& box, const char* what) {
  if (box.map.magic != TensorMap::kMagic) fail(what, " with a tensor map that is none");
  const Swizzle swizzle = box.map.swizzle;
  if (shared % swizzle_period(swizzle) != 0) {
    if (swizzle == Swizzle::kNone) fail(what, " at shared address ", hex(shared), ", off the 128-byte boundary of TMA");
    fail(what, " at shared address ", hex(shared), ": the ", static_cast<uint32_t>(swizzle),
         "-byte swizzle repeats every ", swizzle_period(swizzle), " bytes and must start there");
  }
  if (shared < block.begin || shared + box.bytes() > block.end) {
    fail(what, " of ", box.bytes(), " bytes at shared address ", hex(shared), " leaves the block's memory, ",
         hex(block.begin), " to ", hex(block.end));
  }
}

template <class F>
void each_line(uint32_t shared, uint32_t bytes, F&& f) {
  for (uint32_t line = shared / 128; line < (shared + bytes) / 128; ++line) f(line);
}

}  // namespace

bool Box::row(int row, const uint8_t*& address, uint32_t& bytes, uint32_t& skip) const {
  const int64_t y = at[1] + row % map.box[1], z = at[2] + row / map.box[1];
  if (y < 0 || y >= map.sizes[1] || z < 0 || z >= map.sizes[2]) return false;
  const int64_t first = std::max<int64_t>(at[0], 0), end = std::min<int64_t>(at[0] + map.box[0], map.sizes[0]);
  if (first >= end) return false;
  address = map.base + y * map.strides[0] + z * map.strides[1] + first * 2;
  bytes = static_cast<uint32_t>(end - first) * 2;
  skip = static_cast<uint32_t>(first - at[0]) * 2;
  return true;
}

StoreOperation* TmaQueue::add(const StoreOperation& store, Thread& thread) {
  operations_.push_back(store);
  stores_.push_back({&operations_.back(), &thread});
  return &operations_.back();
}

void TmaQueue::run(size_t i) { i < loads_.size() ? run_load(i) : run_store(i - loads_.size()); }

void TmaQueue::run_load(size_t i) {
  const LoadOperation load = std::move(loads_[i]);
  loads_[i] = std::move(loads_.back());
  loads_.pop_back();
  Block& block = *load.block;
  const uint32_t row_bytes = load.box.row_bytes(), mask = swizzle_mask(load.box.map.swizzle);
  for (int row = 0; row < load.box.rows(); ++row) {
    uint8_t values[128] = {};
    const uint8_t* address;
    uint32_t bytes, skip;
    if (load.box.row(row, address, bytes, skip)) std::memcpy(values + skip, address, bytes);
    const uint32_t place = load.shared + static_cast<uint32_t>(row) * row_bytes;
    for (uint32_t chunk = 0; chunk < row_bytes; chunk += 16) {
      std::memcpy(block.window + swizzled(place + chunk, mask), values + chunk, 16);
    }
  }
  Mbarrier& barrier = mbarrier_at(block, load.barrier);
  if (checks()) {
    each_line(load.shared, load.box.bytes(),
              [&](uint32_t line) { block.shadow->end_load(line, barrier.agent, load.time); });
  }
  --block.loads_in_flight;
  complete_bytes(barrier, load.time, load.box.bytes());
}

// A store first reads shared memory and later writes global memory.
void TmaQueue::run_store(size_t i) {
  const Store store = stores_[i];
  StoreOperation& operation = *store.operation;
  const int rows = operation.box.rows();
  const uint32_t mask = swizzle_mask(operation.box.map.swizzle);
  if (!operation.read) {
    operation.staged.resize(operation.box.bytes());
    for (uint32_t at = 0; at < operation.box.bytes(); at += 16) {
      std::memcpy(&operation.staged[at], operation.block->window + swizzled(operation.shared + at, mask), 16);
    }
    operation.read = true;
  } else {
    for (int row = 0; row < rows; ++row) {
      const uint8_t* address;
      uint32_t bytes, skip;
      if (!operation.box.row(row, address, bytes, skip)) continue;
      const uint32_t from = static_cast<uint32_t>(row) * operation.box.row_bytes() + skip;
      std::memcpy(const_cast<uint8_t*>(address), &operation.staged[from], bytes);
    }
    operation.written = true;
    operation.staged = {};
    stores_[i] = stores_.back();
    stores_.pop_back();
  }
  engine->wake(store.thread->stores.waiting);
}

namespace {

void issue_load(void* shared, const Box& box, uint64_t* barrier, uint32_t blocks) {
  maybe_yield();
  Thread& thread = *current;
  const uint32_t place = shared_address(shared), barrier_address = shared_address(barrier);
  check_place(*thread.block, place, box, "TMA load");
  const auto& cluster = thread.block->cluster->blocks;
  if (blocks == 0 || blocks >> cluster.size() != 0) {
    fail("TMA load to blocks ", hex(blocks), " of a cluster of ", cluster.size());
  }
  for (const auto& target : cluster) {
    if ((blocks >> target->rank & 1) == 0) continue;
    if (target->exited) fail("TMA load into block ", target->number, ", which has ended");
    check_mbarrier_for_tma(thread, *target, barrier_address);
    Mbarrier& counted = mbarrier_at(*target, barrier_address);
    const uint32_t time = ++counted.copies;
    if (checks()) {
      each_line(place, box.bytes(), [&](uint32_t line) { target->shadow->begin_load(thread, line); });
      Access access;
      access.time = time;
      access.agent = counted.agent;
      access.async = 1;
      for (int row = 0; row < box.rows(); ++row) {
        const uint8_t* address;
        uint32_t bytes, skip;
        if (box.row(row, address, bytes, skip)) global_shadow.read(thread, address, bytes, Proxy::kAsync, access);
      }
    }
    ++target->loads_in_flight;
    engine->tma.add(LoadOperation{box, target.get(), place, barrier_address, time});
    ++mutable_statistics().tma_loads;
  }
  tick(thread);
}

}  // namespace

void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* barrier, uint32_t blocks) {
  issue_load(shared, Box{map, {x, y, z}}, barrier, blocks);
}

void tma_load(void* shared, const TensorMap& map, int x, int y, int z, uint64_t* barrier) {
  issue_load(shared, Box{map, {x, y, z}}, barrier, 1u << current->block->rank);
}

void tma_store(const TensorMap& map, const void* shared, int x, int y) {
  maybe_yield();
  Thread& thread = *current;
  const Box box{map, {x, y, 0}};
  const uint32_t place = shared_address(shared);
  check_place(*thread.block, place, box, "TMA store");
  if (checks()) {
    each_line(place, box.bytes(),
              [&](uint32_t line) { thread.block->shadow->begin_async_read(thread, line, "TMA store"); });
    Access access = access_of(thread, Proxy::kAsync);
    access.state = Access::kInFlight;
    for (int row = 0; row < box.rows(); ++row) {
      const uint8_t* address;
      uint32_t bytes, skip;
      if (box.row(row, address, bytes, skip)) global_shadow.write(thread, address, bytes, access);
    }
  }
  thread.stores.groups.back().push_back(engine->tma.add(StoreOperation{box, place, thread.block, {}}, thread));
  ++mutable_statistics().tma_stores;
}

void tma_store_commit() { current->stores.groups.emplace_back(); }

void tma_store_wait(int pending, bool read) {
  maybe_yield();
  Thread& thread = *current;
  auto& groups = thread.stores.groups;
  const int waited = static_cast<int>(groups.size()) - 1 - pending;
  for (int g = 0; g < waited; ++g) {
    for (StoreOperation* store : groups[static_cast<size_t>(g)]) {
      while (!(read ? store->read : store->written)) {
        wait_in(thread.stores.waiting, {read ? Waiting::kStoreRead : Waiting::kStore, store->shared, 0, nullptr});
      }
      if (!checks()) continue;
      if (!store->read_retired) {
        store->read_retired = true;
        each_line(store->shared, store->box.bytes(),
                  [&](uint32_t line) { thread.block->shadow->end_async_read(thread, line); });
      }
      if (read) continue;
      for (int row = 0; row < store->box.rows(); ++row) {
        const uint8_t* address;
        uint32_t bytes, skip;
        if (store->box.row(row, address, bytes, skip)) global_shadow.retire_store(thread, address, bytes);
      }
    }
    if (!read) groups[static_cast<size_t>(g)].clear();
  }
  // what is complete needs no more waiting
  while (groups.size() > 1 && groups.front().empty()) groups.erase(groups.begin());
}

void fence_proxy_async(bool shared_only) {
  Thread& thread = *current;
  LaneFences& fences = thread.warp->fences[thread.lane];
  (shared_only ? fences.shared : fences.all).push_back(thread.warp->time);
  thread.proxied_shared = thread.clock;
  if (!shared_only) {
    thread.proxied = thread.clock;
    thread.has_proxied = true;
  }
  tick(thread);
}

}  // namespace lorafuse::emu

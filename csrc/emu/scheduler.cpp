// The steps of a launch: starting blocks, resuming threads, asynchronous operations.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>

#include "engine.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define LORAFUSE_EMU_POISON(begin, bytes) __asan_poison_memory_region(begin, bytes)
#define LORAFUSE_EMU_UNPOISON(begin, bytes) __asan_unpoison_memory_region(begin, bytes)
#else
#define LORAFUSE_EMU_POISON(begin, bytes) static_cast<void>(0)
#define LORAFUSE_EMU_UNPOISON(begin, bytes) static_cast<void>(0)
#define LORAFUSE_EMU_REUSES 1
#endif

namespace lorafuse::emu {

namespace {

// What blocks that have ended leave to those that start: allocating it and touching it first took a fourth of a launch.
// AddressSanitizer shall see who uses a block's memory too late, and gets none back.
struct Left {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<SharedShadow>> shadows;
  // Of kWindowBytes each.
  std::vector<uint8_t*> windows;
} left;
// More than a block has on any GPU; a larger one gets a window of its own.
constexpr uint32_t kWindowBytes = 256 << 10;

template <class T>
std::unique_ptr<T> take(std::vector<std::unique_ptr<T>>& from) {
  if (from.empty()) return std::make_unique<T>();
  std::unique_ptr<T> one = std::move(from.back());
  from.pop_back();
  return one;
}

uint8_t* take_window(uint32_t bytes) {
#ifdef LORAFUSE_EMU_REUSES
  if (bytes <= kWindowBytes) {
    if (!left.windows.empty()) {
      uint8_t* window = left.windows.back();
      left.windows.pop_back();
      return window;
    }
    bytes = kWindowBytes;
  }
#endif
  void* window = std::aligned_alloc(kWindowAlignment, bytes);
  if (!window) throw std::bad_alloc();
  return static_cast<uint8_t*>(window);
}

// The rest of a block's memory, from the end of its own to the end of the last line.
uint32_t window_bytes(uint32_t end) { return (end + kWindowAlignment - 1) / kWindowAlignment * kWindowAlignment; }

void check_exit(Thread& thread) {
  if (!checks()) return;
  if (thread.wgmma.retired != thread.wgmma.issued) {
    fail("a thread ends with a wgmma that it has not committed and waited for");
  }
  if (!thread.stores.groups.back().empty()) fail("a thread ends with a TMA store that it has not committed");
  for (const auto& group : thread.stores.groups) {
    for (const StoreOperation* store : group) {
      if (!store->read_retired) {
        fail("a thread ends before its TMA store has read shared memory: tma_store_wait_read is missing");
      }
    }
  }
  for (const auto& group : thread.copies) {
    if (!group.empty()) fail("a thread ends with a copy_async that it has not waited for");
  }
}

void thread_main() {
  Fiber::entered();
  Thread& thread = *current;
  try {
    if (engine->cancelled) throw Cancelled();
    engine->kernel();
    check_exit(thread);
    thread.finished = true;
    Block& block = *thread.block;
    --block.live;
    --block.cluster->live;
    arrive_exited(block);
    if (block.live == 0) engine->block_ended(block);
  } catch (const Cancelled&) {
  } catch (const Error& error) {
    engine->record(error);
  } catch (const std::exception& error) {
    engine->record(Error(describe(thread) + ": " + error.what()));
  }
  thread.finished = true;
  thread.fiber.finish();
}

}  // namespace

Engine::Engine(const LaunchShape& launch, std::function<void()> body)
    : shape(launch), kernel(std::move(body)), random(config().seed * 7919 + 17) {
  // rarely, sometimes, mostly and nearly always: both very late and very early copies must happen
  constexpr uint32_t kPercents[] = {2, 12, 50, 88, 98};
  async_percent_ = kPercents[random.below(std::size(kPercents))];
  start_percent_ = kPercents[random.below(std::size(kPercents))];
  schedule_ = static_cast<Schedule>(random.below(4));
  elected_lane = random.below(32);
  const uint32_t warps = static_cast<uint32_t>(shape.threads / 32);
  agents_per_block = warps + kMaxMbarriers;
  agents_per_cluster = agents_per_block * static_cast<uint32_t>(shape.cluster);
  agents = agents_per_block * static_cast<uint32_t>(shape.grid);
  if (agents >= Access::kPreviousLaunch) {
    throw Error("a grid of " + std::to_string(shape.grid) + " blocks is too large for the emulator");
  }
  for (int c = 0; c < shape.grid / shape.cluster; ++c) {
    auto cluster = std::make_unique<Cluster>();
    cluster->number = c;
    cluster->first_agent = agents_per_cluster * static_cast<uint32_t>(c);
    for (int rank = 0; rank < shape.cluster; ++rank) {
      auto block = std::make_unique<Block>();
      block->number = c * shape.cluster + rank;
      block->rank = static_cast<uint32_t>(rank);
      block->cluster = cluster.get();
      cluster->blocks.push_back(std::move(block));
    }
    not_started_.push_back(cluster.get());
    clusters.push_back(std::move(cluster));
  }
  // The last is started first. Hardware mostly goes by number, and promises nothing.
  const uint32_t order = random.below(4);
  if (order == 0) std::reverse(not_started_.begin(), not_started_.end());
  if (order >= 2) {
    for (size_t i = not_started_.size(); i > 1; --i) std::swap(not_started_[i - 1], not_started_[random.below(i)]);
  }
}

Engine::~Engine() {
  for (const auto& cluster : clusters) free_memory(*cluster);
}

void Engine::free_memory(Cluster& cluster) {
  for (const auto& block : cluster.blocks) {
    if (block->window) free_memory(*block);
  }
}

void Engine::free_memory(Block& block) {
  const uint32_t bytes = window_bytes(block.end);
  LORAFUSE_EMU_UNPOISON(block.window, bytes);
#ifdef LORAFUSE_EMU_REUSES
  for (auto& thread : block.threads) {
    thread->fiber.give_stack_back();
    left.threads.push_back(std::move(thread));
  }
  left.shadows.push_back(std::move(block.shadow));
  if (bytes <= kWindowBytes) left.windows.push_back(std::exchange(block.window, nullptr));
#endif
  std::free(block.window);
  block.window = nullptr;
  block.shadow.reset();
  // warps stay: others may ask what a lane has fenced
  block.threads.clear();
}

Block& Engine::block_of(Agent agent) const {
  const uint32_t block = agent / agents_per_block;
  const uint32_t cluster_size = static_cast<uint32_t>(shape.cluster);
  return *clusters[block / cluster_size]->blocks[block % cluster_size];
}

bool Engine::is_mbarrier(Agent agent) const {
  return agent % agents_per_block >= static_cast<uint32_t>(shape.threads / 32);
}

Warp& Engine::warp_of(Agent agent) const { return *block_of(agent).warps[agent % agents_per_block]; }

void Engine::start(Cluster& cluster) {
  cluster.started = true;
  // The base of dynamic shared memory is on a 16-byte boundary, and the same in all blocks of a cluster.
  const uint32_t begin = kWindowAlignment + 16 * random.below(kWindowAlignment / 16);
  cluster.barrier.joined.reset(cluster.first_agent, agents_per_cluster);
  for (const auto& pointer : cluster.blocks) {
    Block& block = *pointer;
    block.begin = begin;
    block.end = begin + static_cast<uint32_t>(shape.shared_bytes);
    const uint32_t bytes = window_bytes(block.end);
    block.window = take_window(bytes);
    // neither a number as bf16, fp16 or fp32
    std::memset(block.window, 0xff, bytes);
    LORAFUSE_EMU_POISON(block.window, block.begin);
    LORAFUSE_EMU_POISON(block.window + block.end, bytes - block.end);
    block.shadow = take(left.shadows);
    block.shadow->reset(block, bytes);
    for (Barrier& barrier : block.barriers) barrier.joined.reset(cluster.first_agent, agents_per_cluster);
    create_threads(block);
    cluster.live += block.live;
    ++running_blocks_;
  }
}

void Engine::create_threads(Block& block) {
  const Agent first_agent = agents_per_block * static_cast<uint32_t>(block.number);
  for (int w = 0; w < shape.threads / 32; ++w) {
    auto warp = std::make_unique<Warp>();
    warp->block = &block;
    warp->agent = first_agent + static_cast<Agent>(w);
    warp->priority = random.below(1000);
    block.warps.push_back(std::move(warp));
  }
  for (int g = 0; g < shape.threads / 128; ++g) {
    block.warpgroups.push_back(std::make_unique<Warpgroup>());
    block.warpgroups.back()->block = &block;
  }
  for (int t = 0; t < shape.threads; ++t) {
    auto thread = take(left.threads);
    thread->reset();
    thread->index.x = static_cast<unsigned>(t);
    thread->number = t;
    thread->lane = static_cast<uint32_t>(t % 32);
    thread->block = &block;
    thread->warp = block.warps[static_cast<size_t>(t / 32)].get();
    thread->clock.reset(block.cluster->first_agent, agents_per_cluster);
    thread->cluster_clock = thread->clock;
    thread->fiber.prepare(thread_main);
    make_ready(*thread);
    block.threads.push_back(std::move(thread));
  }
  block.live = shape.threads;
}

void Engine::make_ready(Thread& thread) {
  Warp& warp = *thread.warp;
  warp.ready.push_back(&thread);
  if (warp.position < 0) {
    warp.position = static_cast<int>(ready_warps_.size());
    ready_warps_.push_back(&warp);
  }
}

void Engine::wake(Queue& queue) {
  for (Thread* thread : queue) make_ready(*thread);
  queue.clear();
}

void Engine::block_ended(Block& block) {
  if (checks() && block.loads_in_flight > 0) {
    fail("block ", block.number, " ends with ", block.loads_in_flight, " TMA loads or copies into its shared memory in flight");
  }
  block.exited = true;
  --running_blocks_;
  if (block.cluster->live == 0) ended_.push_back(block.cluster);
}

void Engine::record(const Error& error) {
  if (!error_) error_ = std::make_unique<Error>(error);
}

bool Engine::start_next_cluster() {
  if (not_started_.empty()) return false;
  const int resident = std::max(config().resident > 0 ? config().resident : config().multiprocessors, shape.cluster);
  if (running_blocks_ + shape.cluster > resident) return false;
  start(*not_started_.back());
  not_started_.pop_back();
  return true;
}

bool Engine::asynchronous_step() {
  const size_t copies = copy_arrivals.size(), operations = tma.size() + copies + ready_warpgroups.size();
  if (operations == 0) return false;
  if (!ready_warps_.empty() && !random.chance(async_percent_)) return false;
  const size_t i = random.below(operations);
  if (i < tma.size()) {
    tma.run(i);
    return true;
  }
  if (i < tma.size() + copies) {
    run_copy_arrival(i - tma.size());
    return true;
  }
  Warpgroup*& warpgroup = ready_warpgroups[i - tma.size() - copies];
  execute(*warpgroup);
  if (!executable(*warpgroup)) {
    warpgroup->queued = false;
    warpgroup = ready_warpgroups.back();
    ready_warpgroups.pop_back();
  }
  return true;
}

Warp& Engine::choose_warp() {
  Warp* chosen = ready_warps_[random.below(ready_warps_.size())];
  if (schedule_ == Schedule::kUniform) return *chosen;
  // one of few, by priority; where warps starve, by priority alone
  const size_t candidates = schedule_ == Schedule::kStarving ? std::min<size_t>(ready_warps_.size(), 16) : 2;
  for (size_t i = 1; i < candidates; ++i) {
    Warp* other = ready_warps_[random.below(ready_warps_.size())];
    if (other->priority > chosen->priority) chosen = other;
  }
  if (schedule_ == Schedule::kChangingPriorities && random.below(64) == 0) chosen->priority = random.below(1000);
  return *chosen;
}

void Engine::thread_step() {
  Warp& warp = choose_warp();
  Warp* last = ready_warps_.back();
  ready_warps_[static_cast<size_t>(warp.position)] = last;
  last->position = warp.position;
  ready_warps_.pop_back();
  warp.position = -1;
  step_.swap(warp.ready);
  const size_t first = random.below(step_.size());
  const size_t count = step_.size();
  for (size_t i = 0; i < count && !error_; ++i) {
    step_[(i + first + 2) % count]->fiber.fetch();
    resume(*step_[(i + first) % count]);
  }
  step_.clear();
}

void Engine::resume(Thread& thread) {
  ++mutable_statistics().switches;
  current = &thread;
  thread.fiber.resume();
  current = nullptr;
  if (thread.finished) thread.fiber.give_stack_back();
}

void Engine::run() {
  Statistics& statistics = mutable_statistics();
  try {
    while (!error_) {
      if (++statistics.steps > config().step_limit) {
        fail("the launch has not ended after ", config().step_limit, " steps");
      }
      if (!ended_.empty() && tma.size() == 0 && copy_arrivals.empty()) {
        for (Cluster* cluster : ended_) free_memory(*cluster);
        ended_.clear();
      }
      const bool idle = ready_warps_.empty() && tma.size() == 0 && copy_arrivals.empty() && ready_warpgroups.empty();
      if ((idle || random.chance(start_percent_)) && start_next_cluster()) continue;
      if (asynchronous_step()) continue;
      if (!ready_warps_.empty()) {
        thread_step();
        continue;
      }
      if (not_started_.empty() && running_blocks_ == 0) return;
      fail(deadlock_report());
    }
  } catch (const Error& error) {
    record(error);
  }
  cancel();
  throw Error(*error_);
}

// Unwinds the stack of every thread that has not ended.
void Engine::cancel() {
  cancelled = true;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      for (const auto& thread : block->threads) {
        if (!thread->finished) resume(*thread);
      }
    }
  }
}

void wait_in(Queue& queue, const Waiting& waiting) {
  Thread& thread = *current;
  queue.push_back(&thread);
  thread.waiting = waiting;
  thread.fiber.suspend();
  if (engine->cancelled) throw Cancelled();
  thread.waiting = {};
}

void yield() {
  Thread& thread = *current;
  engine->make_ready(thread);
  thread.fiber.suspend();
  if (engine->cancelled) throw Cancelled();
}

void maybe_yield() {
  if (engine->random.below(4) == 0) yield();
}

}  // namespace lorafuse::emu

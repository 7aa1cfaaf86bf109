// The emulated machine: threads, warps, blocks and clusters, and the scheduler that runs them.
//
// Threads are fibers. The scheduler, by a seeded draw, resumes the threads of some warp, or lets one asynchronous
// operation happen (a TMA copy, a wgmma), or starts the blocks of a cluster. A thread runs until it has to wait; before
// an operation that others can see it sometimes yields.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "clock.hpp"
#include "device.hpp"
#include "emulator.hpp"
#include "fiber.hpp"
#include "memory_model.hpp"
#include "tma.hpp"
#include "wgmma.hpp"

namespace lorafuse::emu {

struct Thread;
struct Warp;
struct Block;
struct Cluster;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  uint32_t below(size_t n) { return static_cast<uint32_t>((next() >> 32) * n >> 32); }
  // True in `percent` of 100 draws.
  bool chance(uint32_t percent) { return below(100) < percent; }

 private:
  uint64_t state_;
};

// What a blocked thread waits for, for the report of a deadlock.
struct Waiting {
  enum Kind { kNothing, kMbarrier, kNamedBarrier, kCluster, kWarp, kWgmma, kStoreRead, kStore, kFlag };
  Kind kind = kNothing;
  // The shared address, barrier number or address of the counter.
  uint64_t where = 0;
  // The parity, number of threads or value.
  uint64_t value = 0;
  // The name of a warp's operation.
  const char* operation = nullptr;

  auto operator<=>(const Waiting&) const = default;
};

using Queue = std::vector<Thread*>;

struct Mbarrier {
  uint32_t address;
  Agent agent;
  int expected;
  int pending;
  // Bytes announced and not yet arrived; below zero while a copy is ahead of its announcement.
  int64_t bytes = 0;
  uint64_t phase = 0;
  // Times of the agent: one a TMA load, or a CopyArrival.
  uint32_t copies = 0;
  // Other blocks of the cluster arrive here.
  bool remote = false;
  // Made visible to the async proxy and the cluster.
  bool fenced = false;
  Access init;
  // Of all who arrived, and as it was when the last phase completed.
  Clock arrived, completed;
  Queue waiting;
};

// Of a block or cluster.
struct Barrier {
  // Threads that those who are there expect.
  int count = 0;
  int arrived = 0;
  uint64_t generation = 0;
  Clock joined, completed;
  Queue waiting;
};

// A step that all lanes of a warp take together.
struct Rendezvous {
  const char* operation = nullptr;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  std::array<void*, 32> slots{};
  Queue waiting;
};

struct AsyncCopy {
  uint32_t shared;
  const void* global;
  int bytes;
  bool moved;
};

// Copies of one thread that arrive together at an mbarrier, when all of them have landed.
struct CopyArrival {
  std::vector<AsyncCopy> copies;
  Block* block;
  uint32_t barrier;
  uint32_t time;
};

struct Thread {
  Fiber fiber;
  Index index;
  int number = 0;
  uint32_t lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool finished = false;
  Waiting waiting;

  Clock clock;
  // As of the last cluster_sync: what other blocks have stored in this one's memory can be read only after that.
  Clock cluster_clock;
  // What the thread knew at its last fence_proxy_async, and at the last one of either kind.
  Clock proxied, proxied_shared;
  bool has_proxied = false;

  WgmmaIssuer wgmma;
  StoreIssuer stores;
  // copy_async groups, oldest first; the last is the open one.
  std::vector<std::vector<AsyncCopy>> copies{1};

  // As of a thread that has not run yet; memory is kept.
  void reset() {
    finished = has_proxied = false;
    waiting = {};
    proxied = proxied_shared = Clock();
    wgmma.reset();
    stores.reset();
    copies.resize(1);
    copies[0].clear();
  }
};

// When a lane has called fence_proxy_async and fence_proxy_async_shared.
struct LaneFences {
  Times all, shared;
};

struct Warp {
  Block* block = nullptr;
  Agent agent = 0;
  // Grows whenever a lane tells something to others.
  uint32_t time = 1;
  std::array<LaneFences, 32> fences;
  Rendezvous rendezvous;
  Queue ready;
  // In the scheduler's list, or -1.
  int position = -1;
  uint32_t priority = 0;
};

struct Block {
  int number = 0;
  uint32_t rank = 0;
  Cluster* cluster = nullptr;
  // Shared addresses are offsets into `window`; the block's memory is [begin, end).
  uint8_t* window = nullptr;
  uint32_t begin = 0, end = 0;
  std::unique_ptr<SharedShadow> shadow;
  std::deque<Mbarrier> mbarriers;
  std::array<Barrier, 16> barriers;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Warpgroup>> warpgroups;
  int live = 0;
  int loads_in_flight = 0;
  bool exited = false;
};

struct Cluster {
  int number = 0;
  Agent first_agent = 0;
  bool started = false;
  int live = 0;
  std::vector<std::unique_ptr<Block>> blocks;
  Barrier barrier;
};

struct Flag {
  // What the releases to it carry.
  GridTimes times;
  Queue waiting;
};

struct LaunchShape {
  int grid = 1;
  int threads = 1;
  int shared_bytes = 0;
  int cluster = 1;
  bool overlap_previous = false;
};

// Barriers a block can have; each is an agent.
constexpr int kMaxMbarriers = 40;
constexpr uint32_t kWindowAlignment = 1024;

// Everything of one launch.
class Engine {
 public:
  Engine(const LaunchShape& shape, std::function<void()> kernel);
  ~Engine();

  // Throws Error.
  void run();

  LaunchShape shape;
  std::function<void()> kernel;
  Random random;
  std::vector<std::unique_ptr<Cluster>> clusters;
  uint32_t agents_per_block = 0, agents_per_cluster = 0, agents = 0;
  uint32_t elected_lane = 0;
  TmaQueue tma;
  // What has been issued and has not landed; any of it may be next.
  std::vector<CopyArrival> copy_arrivals;
  // With a wgmma that all threads have issued.
  std::vector<Warpgroup*> ready_warpgroups;
  std::unordered_map<const void*, Flag> flags;
  // Some thread has called wait_for_previous_launch.
  bool waited_for_previous = false;
  // Threads are being unwound after an error.
  bool cancelled = false;

  Warp& warp_of(Agent agent) const;
  // The block, and the number of the warp or (from the number of warps on) of the mbarrier.
  Block& block_of(Agent agent) const;
  bool is_mbarrier(Agent agent) const;

  void make_ready(Thread& thread);
  void wake(Queue& queue);
  void block_ended(Block& block);
  // The first error is the launch's.
  void record(const Error& error);

 private:
  void start(Cluster& cluster);
  void create_threads(Block& block);
  void free_memory(Block& block);
  bool start_next_cluster();
  bool asynchronous_step();
  void thread_step();
  Warp& choose_warp();
  void resume(Thread& thread);
  void cancel();
  void free_memory(Cluster& cluster);
  std::string deadlock_report() const;

  enum class Schedule { kUniform, kPriorities, kChangingPriorities, kStarving };
  Schedule schedule_ = Schedule::kUniform;
  // Percent of steps that go to asynchronous operations, and to starting blocks, where there are both.
  uint32_t async_percent_ = 50, start_percent_ = 50;
  std::vector<Warp*> ready_warps_;
  std::vector<Cluster*> not_started_;
  int running_blocks_ = 0;
  // Their memory is freed when no copy is in flight.
  std::vector<Cluster*> ended_;
  std::vector<Thread*> step_;
  std::unique_ptr<Error> error_;
};

extern Engine* engine;
extern Thread* current;
// Counters that earlier launches, which this one may overlap, have used.
extern std::unordered_set<const void*> previous_counters;

// What unwinds a thread's stack after another's error.
struct Cancelled {};

// Throws Error with the place and the parts of the text.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts);
[[noreturn]] void fail_with(const std::string& text);
// "warp 3 of block 1", "a TMA load", ...
std::string describe(const Access& access);
std::string describe(const Thread& thread);
std::string describe_shared(const Block& block, uint32_t address);
std::string describe_global(const void* p);
std::string hex(uint64_t value);

// Blocks the current thread until it is made ready.
void wait_in(Queue& queue, const Waiting& waiting);
void yield();
// Before an operation that others can see.
void maybe_yield();
// All lanes of the warp come here, each with its slot; the last one completes the step.
void rendezvous(const char* operation, void* slot, const std::function<void(const std::array<void*, 32>&)>& complete);

// The address of `bytes` of the block's shared memory; throws where they are not.
uint32_t checked_shared(const void* p, size_t bytes, size_t alignment, const char* what);
// Copy arrival `i` of the engine's happens.
void run_copy_arrival(size_t i);

// Barriers.
Mbarrier& mbarrier_at(Block& block, uint32_t address);
void check_init(const Thread& thread, const Block& block, const Mbarrier& barrier);
void check_mbarrier_for_tma(const Thread& thread, Block& block, uint32_t address);
// A TMA load's bytes have come; copies of a thread have.
void complete_bytes(Mbarrier& barrier, uint32_t time, int64_t bytes);
void complete_copies(Block& block, Mbarrier& barrier, uint32_t time);
void arrive_exited(Block& block);

inline void tick(Thread& thread) { ++thread.warp->time; }
// Gives what the thread knows and has done to `clock`.
inline void release(Thread& thread, Clock& clock) {
  clock.join(thread.clock);
  clock.raise(thread.warp->agent, thread.warp->time);
  tick(thread);
}
inline bool checks() { return config().checks; }

// The entry of what `thread` does now.
inline Access access_of(const Thread& thread, Proxy proxy = Proxy::kGeneric) {
  Access access;
  access.time = thread.warp->time;
  access.agent = thread.warp->agent;
  access.lane = thread.lane;
  access.async = proxy == Proxy::kAsync;
  return access;
}
// What the thread does now comes after `access`. Asked of every word of memory.
inline bool ordered_after(const Thread& thread, const Access& access) {
  if (access.agent == Access::kPreviousLaunch) return thread.clock.previous();
  if (access.agent == thread.warp->agent && access.lane == thread.lane && !access.lanes) return true;
  return thread.clock.at(access.agent) >= access.time;
}

Statistics& mutable_statistics();

}  // namespace lorafuse::emu

#include "report.hpp"

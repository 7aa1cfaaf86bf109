// Vector clocks: what a thread knows of what others have done.
//
// An agent is what has a time of its own: every warp, and every mbarrier for the copies that it counts. The agents of a
// cluster are numbered one after the other. Threads of a warp share the warp's time, but each knows what it has itself
// acquired: a wait by lane 0 tells lane 1 nothing.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace lorafuse::emu {

using Agent = uint32_t;
using Times = std::vector<uint32_t>;

// What a release through global memory carries: the times of all agents of the grid.
struct GridTimes {
  std::shared_ptr<const Times> times;
  bool previous = false;
};

class Clock {
 public:
  // Of a thread or barrier in the cluster whose `count` agents begin with `first`.
  void reset(Agent first, uint32_t count) {
    first_ = first;
    near_.assign(count, 0);
    far_.reset();
    previous_ = false;
  }

  // The latest moment of the agent that is known.
  uint32_t at(Agent agent) const {
    const uint32_t local = agent - first_;
    if (local < near_.size()) return near_[local];
    return far_ ? (*far_)[agent] : 0;
  }

  void raise(Agent agent, uint32_t time) {
    uint32_t& known = near_[agent - first_];
    known = std::max(known, time);
  }

  // Learns what a clock of the same cluster knows.
  void join(const Clock& other) {
    for (size_t i = 0; i < near_.size(); ++i) near_[i] = std::max(near_[i], other.near_[i]);
    join_far(other.far_);
    previous_ = previous_ || other.previous_;
  }

  void join(const GridTimes& grid) {
    previous_ = previous_ || grid.previous;
    if (!grid.times) return;
    for (size_t i = 0; i < near_.size(); ++i) near_[i] = std::max(near_[i], (*grid.times)[first_ + i]);
    join_far(grid.times);
  }

  // Adds what this clock knows to `grid`, of `agents` agents in all.
  void publish(GridTimes& grid, uint32_t agents) const {
    auto times = grid.times ? std::make_shared<Times>(*grid.times) : std::make_shared<Times>(agents, 0);
    if (far_) raise_all(*times, *far_);
    for (size_t i = 0; i < near_.size(); ++i) (*times)[first_ + i] = std::max((*times)[first_ + i], near_[i]);
    grid.times = std::move(times);
    grid.previous = grid.previous || previous_;
  }

  // The launch before this one is complete.
  bool previous() const { return previous_; }
  void learn_previous() { previous_ = true; }

 private:
  static void raise_all(Times& times, const Times& other) {
    for (size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], other[i]);
  }

  void join_far(const std::shared_ptr<const Times>& other) {
    if (!other || other == far_) return;
    if (!far_) {
      far_ = other;
      return;
    }
    auto times = std::make_shared<Times>(*far_);
    raise_all(*times, *other);
    far_ = std::move(times);
  }

  Agent first_ = 0;
  Times near_;
  // Agents of other clusters: null until something was acquired from one, and shared by all who know the same.
  std::shared_ptr<const Times> far_;
  bool previous_ = false;
};

// One access to a piece of memory, as the shadow of that memory keeps it.
struct Access {
  enum State : uint32_t {
    kDone,
    // Written by an asynchronous copy that its thread has not waited for.
    kInFlight,
  };
  // An agent that stands for everything the launch before this one did.
  static constexpr Agent kPreviousLaunch = (1u << 22) - 1;

  // 0: there was none.
  uint32_t time = 0;
  uint32_t agent : 22 = 0;
  uint32_t lane : 5 = 0;
  // Which of the two halves of a 4-byte word.
  uint32_t halves : 2 = 3;
  // Through the async proxy.
  uint32_t async : 1 = 0;
  uint32_t state : 1 = kDone;
  // A read by other lanes of the warp too.
  uint32_t lanes : 1 = 0;

  explicit operator bool() const { return time != 0; }
};
static_assert(sizeof(Access) == 8);

}  // namespace lorafuse::emu

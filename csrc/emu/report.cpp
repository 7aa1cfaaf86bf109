// What went wrong, in words.
#include <cstdio>
#include <map>

#include "engine.hpp"

namespace lorafuse::emu {

std::string hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "%#llx", static_cast<unsigned long long>(value));
  return text;
}

std::string describe(const Thread& thread) {
  return "block " + std::to_string(thread.block->number) + " warp " + std::to_string(thread.number / 32) + " lane " +
         std::to_string(thread.lane);
}

std::string describe(const Access& access) {
  if (access.agent == Access::kPreviousLaunch) {
    return "the launch before, which wait_for_previous_launch has not waited for";
  }
  const Block& block = engine->block_of(access.agent);
  const uint32_t number = access.agent % engine->agents_per_block;
  if (engine->is_mbarrier(access.agent)) {
    const Mbarrier& barrier = block.mbarriers[number - block.warps.size()];
    const char* what = access.async ? "a TMA load" : "asynchronous copies";
    return std::string(what) + " counted by the mbarrier at " + describe_shared(block, barrier.address);
  }
  return "block " + std::to_string(block.number) + " warp " + std::to_string(number) + " lane " +
         std::to_string(access.lane);
}

std::string describe_shared(const Block& block, uint32_t address) {
  const std::string base = "shared memory + " + std::to_string(static_cast<int64_t>(address) - block.begin);
  return base + " bytes of block " + std::to_string(block.number);
}

std::string describe_global(const void* p) { return global_shadow.describe(p); }

void fail_with(const std::string& text) {
  throw Error(current ? describe(*current) + ": " + text : text);
}

namespace {

std::string what_for(const Waiting& waiting, const Block& block) {
  const auto number = [](auto value) { return std::to_string(value); };
  switch (waiting.kind) {
    case Waiting::kNothing: return "waiting for nothing";
    case Waiting::kMbarrier: {
      // the latest at the address
      for (size_t i = block.mbarriers.size(); i-- > 0;) {
        const Mbarrier& barrier = block.mbarriers[i];
        if (barrier.address != waiting.where) continue;
        return "waiting for the phase of parity " + number(waiting.value) + " of mbarrier " + number(i) + " (" +
               describe_shared(block, barrier.address) + "), which is in phase " + number(barrier.phase) +
               " and lacks " + number(barrier.pending) + " of " + number(barrier.expected) + " arrivals and " +
               number(barrier.bytes) + " bytes" + (barrier.bytes < 0 ? " (more have come than were announced)" : "");
      }
      return "waiting for an mbarrier that was initialized anew";
    }
    case Waiting::kNamedBarrier: {
      const Barrier& barrier = block.barriers[waiting.where];
      const std::string name = waiting.where == 0 ? "in block_sync" : "at barrier " + number(waiting.where);
      return "waiting " + name + ", to which " + number(barrier.arrived) + " of " + number(waiting.value) +
             " threads have come";
    }
    case Waiting::kCluster:
      return "waiting in cluster_sync, to which " + number(block.cluster->barrier.arrived) + " of " +
             number(waiting.value) + " threads have come";
    case Waiting::kWarp: return std::string("waiting for the other lanes in ") + waiting.operation;
    case Waiting::kWgmma:
      return "waiting for wgmma " + number(waiting.where - 1) + ", which not all threads have issued";
    case Waiting::kStoreRead: return "waiting until a TMA store has read shared memory";
    case Waiting::kStore: return "waiting until a TMA store is complete";
    case Waiting::kFlag: {
      const auto* counter = reinterpret_cast<const uint32_t*>(static_cast<uintptr_t>(waiting.where));
      return "waiting until the counter at " + describe_global(counter) + " is " + number(waiting.value) + "; it is " +
             number(*counter);
    }
  }
  return "";
}

}  // namespace

std::string Engine::deadlock_report() const {
  constexpr int kMostGroups = 12;
  std::string text = "deadlock: nothing can go on.";
  int groups = 0;
  for (const auto& cluster : clusters) {
    for (const auto& block : cluster->blocks) {
      // who waits for the same: threads by warp
      std::map<Waiting, std::map<int, int>> waiting;
      for (const auto& thread : block->threads) {
        if (!thread->finished) ++waiting[thread->waiting][thread->number / 32];
      }
      for (const auto& [reason, warps] : waiting) {
        if (++groups > kMostGroups) continue;
        text += "\n  block " + std::to_string(block->number) + ":";
        for (const auto& [warp, threads] : warps) {
          text += " warp " + std::to_string(warp) + " (" + std::to_string(threads) + " thread" +
                  (threads == 1 ? ")" : "s)");
        }
        text += " " + what_for(reason, *block);
      }
    }
  }
  if (groups > kMostGroups) text += "\n  and " + std::to_string(groups - kMostGroups) + " other groups";
  if (!not_started_.empty()) {
    text += "\n  not started, for want of room (" + std::to_string(running_blocks_) + " blocks are resident): clusters";
    for (const Cluster* cluster : not_started_) text += " " + std::to_string(cluster->number);
  }
  return text;
}

}  // namespace lorafuse::emu

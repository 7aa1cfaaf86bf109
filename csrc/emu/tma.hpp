// Boxes of tensor maps on their way between global and shared memory.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "device.hpp"

namespace lorafuse::emu {

struct Thread;
struct Block;

struct Box {
  TensorMap map;
  // Of its first element, innermost first.
  int64_t at[3];

  int rows() const { return map.box[1] * map.box[2]; }
  uint32_t row_bytes() const { return static_cast<uint32_t>(map.box[0]) * 2; }
  uint32_t bytes() const { return static_cast<uint32_t>(rows()) * row_bytes(); }
  // The part of row `row` that is inside the tensor: its address and bytes, and the bytes of the row before it. False
  // where nothing is.
  bool row(int row, const uint8_t*& address, uint32_t& bytes, uint32_t& skip) const;
};

struct StoreOperation {
  Box box;
  uint32_t shared;
  Block* block;
  // What has been read from shared memory, and whether it is in global memory.
  std::vector<uint8_t> staged;
  bool read = false, written = false;
  // The thread knows of it.
  bool read_retired = false;
};

// The stores of one thread: groups, oldest first; the last is the open one.
struct StoreIssuer {
  std::vector<std::vector<StoreOperation*>> groups{1};
  std::vector<Thread*> waiting;

  void reset() {
    groups.resize(1);
    groups[0].clear();
    waiting.clear();
  }
};

struct LoadOperation {
  Box box;
  Block* block;
  uint32_t shared;
  uint32_t barrier;
  uint32_t time;
};

// What has been issued and has not happened; any of it may happen next.
class TmaQueue {
 public:
  size_t size() const { return loads_.size() + stores_.size(); }
  void add(const LoadOperation& load) { loads_.push_back(load); }
  // The operation stays where it is until the launch ends.
  StoreOperation* add(const StoreOperation& store, Thread& thread);
  void run(size_t i);

 private:
  struct Store {
    StoreOperation* operation;
    Thread* thread;
  };
  void run_load(size_t i);
  void run_store(size_t i);

  std::vector<LoadOperation> loads_;
  std::vector<Store> stores_;
  std::deque<StoreOperation> operations_;
};

}  // namespace lorafuse::emu

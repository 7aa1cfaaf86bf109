// What tests and bindings need of the emulator: how the next launches run, what the last one did, what it objects to.
//
// One launch at a time, in one process: the state is global and not guarded against threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace lorafuse::emu {

// What a launch throws when the kernel did something that the hardware does not promise to do well.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Config {
  // Draws the schedule, the order in which blocks start, the elected lane and the place of shared memory.
  uint64_t seed = 1;
  // Blocks that run at a time; others start when those have ended. 0: as many as there are multiprocessors.
  int resident = 0;
  // Ordering, proxies, fences. Without them only values, deadlocks and misuse are seen.
  bool checks = true;
  // What multiprocessors() tells the host code.
  int multiprocessors = 4;
  // What shared_memory_limit() does: bytes that a block can have, of sm_90 unless told otherwise.
  int shared_memory = 232448;
  // Whether launches run; those that do not are counted, for whoever measures what the host does.
  bool runs = true;
  // The bug of this name, an LF_PLANTED, is on.
  std::string planted;
  // Steps of the scheduler after which a launch counts as hung.
  uint64_t step_limit = 200'000'000;
};

struct Statistics {
  uint64_t launches = 0;
  // Of the last launch:
  uint64_t steps = 0;
  uint64_t switches = 0;
  uint64_t tma_loads = 0;
  uint64_t tma_stores = 0;
  uint64_t wgmmas = 0;
  uint64_t mmas = 0;
  // Since configure() the planted bug was reached. False for a name that no kernel has, or a line that did not run.
  bool planted_reached = false;
};

void configure(const Config& config);
const Config& config();
const Statistics& statistics();

// Tells of a buffer in global memory, which replaces declared ones that it overlaps. Once one is declared, access to
// memory outside every declared buffer is an error (tracked access: TMA, asynchronous copies, load_global,
// store_global). With `unwritten`, so is a read of a word that no launch has written since.
void declare_memory(const void* begin, size_t bytes, const std::string& name, bool unwritten = false);
// Of a buffer declared `unwritten`: how many of its 4-byte words no launch has written.
size_t unwritten_words(const void* begin, size_t bytes);
// Forgets all declared buffers, and what the last launch wrote (for a next one that overlaps it).
void forget_memory();

}  // namespace lorafuse::emu

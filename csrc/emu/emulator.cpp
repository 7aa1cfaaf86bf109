// Settings, and a launch from outside.
#include <utility>

#include "engine.hpp"

namespace lorafuse::emu {

Engine* engine = nullptr;
Thread* current = nullptr;
bool any_planted = false;
std::unordered_set<const void*> previous_counters;

namespace {

Config current_config;
Statistics last_statistics;
// The last launch overlapped the one before it and never waited for it.
bool last_launch_did_not_wait = false;

}  // namespace

void configure(const Config& config) {
  if (config.resident < 0 || config.multiprocessors < 1) {
    throw std::invalid_argument("resident " + std::to_string(config.resident) + " or multiprocessors " +
                                std::to_string(config.multiprocessors) + " is out of range");
  }
  current_config = config;
  last_statistics.planted_reached = false;
  any_planted = !config.planted.empty();
}

const Config& config() { return current_config; }
const Statistics& statistics() { return last_statistics; }
Statistics& mutable_statistics() { return last_statistics; }
int multiprocessors() { return current_config.multiprocessors; }
int shared_memory_limit() { return current_config.shared_memory; }

bool is_planted(const char* name) {
  if (current_config.planted != name) return false;
  last_statistics.planted_reached = true;
  return true;
}

void declare_memory(const void* begin, size_t bytes, const std::string& name, bool unwritten) {
  global_shadow.declare(begin, bytes, name, unwritten);
}
size_t unwritten_words(const void* begin, size_t bytes) { return global_shadow.unwritten_words(begin, bytes); }
void forget_memory() {
  global_shadow.forget();
  previous_counters.clear();
}

Index thread_index() { return current->index; }
Index block_index() { return {static_cast<unsigned>(current->block->number), 0, 0}; }
Index block_dimensions() { return {static_cast<unsigned>(engine->shape.threads), 1, 1}; }
Index grid_dimensions() { return {static_cast<unsigned>(engine->shape.grid), 1, 1}; }
uint8_t* dynamic_shared() { return current->block->window + current->block->begin; }

void run_launch(int grid, int threads, int shared_bytes, int cluster, bool overlap_previous,
                std::function<void()> kernel) {
  if (engine) throw Error("a launch from inside a launch");
  if (grid < 1 || threads < 32 || threads > 1024 || threads % 32 != 0 || shared_bytes < 0 ||
      shared_bytes > shared_memory_limit() || cluster < 1 || cluster > 8 || grid % cluster != 0) {
    throw Error("a launch of " + std::to_string(grid) + " blocks of " + std::to_string(threads) + " threads and " +
                std::to_string(shared_bytes) + " bytes of shared memory, clusters of " + std::to_string(cluster) +
                ": the emulator takes whole warps up to 1024 threads, up to " + std::to_string(shared_memory_limit()) +
                " bytes, and whole clusters up to 8");
  }
  const Statistics before = last_statistics;
  last_statistics = {};
  last_statistics.launches = before.launches + 1;
  last_statistics.planted_reached = before.planted_reached;
  if (!config().runs) return;
  global_shadow.new_launch(overlap_previous, last_launch_did_not_wait);
  if (!overlap_previous) previous_counters.clear();

  Engine instance({grid, threads, shared_bytes, cluster, overlap_previous}, std::move(kernel));
  engine = &instance;
  struct Reset {
    ~Reset() {
      engine = nullptr;
      current = nullptr;
    }
  } reset;
  last_launch_did_not_wait = false;
  instance.run();
  last_launch_did_not_wait = overlap_previous && !instance.waited_for_previous;
  if (!last_launch_did_not_wait) previous_counters.clear();
  for (const auto& [counter, flag] : instance.flags) previous_counters.insert(counter);
}

}  // namespace lorafuse::emu

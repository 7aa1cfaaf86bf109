// Deadlocks and misuse: what is reported, and that the emulator is as before afterwards.
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

// The text of what the launch throws.
template <class... Parameters, class... Arguments>
std::string said(void (*kernel)(Parameters...), const LaunchConfig& config, const Arguments&... arguments) {
  try {
    launch(kernel, config, nullptr, arguments...);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing";
}

std::string require_parts(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    if (text.find(part) == std::string::npos) return "'" + std::string(part) + "' is not in: " + text;
  }
  return "";
}

LF_KERNEL(64) barrier_kernel() {
  if (threadIdx.x < 32) ptx::named_barrier_sync<3, 64>();
}

// Every block waits for all.
LF_KERNEL(32) meet_kernel(uint32_t* counter) {
  if (threadIdx.x != 0) return;
  ptx::add_release(counter, 1);
  ptx::wait_at_least(counter, gridDim.x);
}

LF_KERNEL(32) mbarrier_kernel() {
  LF_DYNAMIC_SHARED(raw);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(raw);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 2);
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, 0);
  }
}

LF_KERNEL(32) count_kernel(uint32_t* counter) {
  if (threadIdx.x == 0) ptx::fetch_add_relaxed(counter, 1);
}

// Two halves of a word are two elements.
LF_KERNEL(64) halves_kernel(BF16* out) {
  ptx::store_global(out + threadIdx.x, BF16{static_cast<uint16_t>(threadIdx.x)});
}

LF_KERNEL(32) throwing_kernel() { require(threadIdx.x != 7, "lane ", threadIdx.x, " objects"); }

std::string run_reports() {
  emu::forget_memory();
  std::string wrong = require_parts(said(barrier_kernel, {2, 64}),
                                    {"deadlock", "block 1: warp 0 (32 threads)", "barrier 3", "32 of 64"});
  if (!wrong.empty()) return wrong;
  wrong = require_parts(said(mbarrier_kernel, {1, 32, 16}),
                        {"deadlock", "parity 0 of mbarrier 0", "lacks 1 of 2 arrivals"});
  if (!wrong.empty()) return wrong;
  uint32_t counter = 0;
  emu::Config config = emu::config();
  config.resident = 2;
  emu::configure(config);
  wrong = require_parts(said(meet_kernel, {3, 32}, &counter), {"deadlock", "is 3; it is 2", "not started"});
  if (!wrong.empty()) return wrong;
  // the same with room for all, and many blocks with little room
  config.resident = 3;
  emu::configure(config);
  counter = 0;
  launch(meet_kernel, {3, 32}, nullptr, &counter);
  config.resident = 1;
  emu::configure(config);
  counter = 0;
  launch(count_kernel, {100, 32}, nullptr, &counter);
  if (counter != 100) return "of 100 blocks " + std::to_string(counter) + " have run";
  wrong = require_parts(said(throwing_kernel, {1, 32}), {"block 0 warp 0 lane 7", "lane 7 objects"});
  if (!wrong.empty()) return wrong;
  wrong = require_parts(said(count_kernel, {3, 32, 0, 2}, &counter), {"whole clusters"});
  if (!wrong.empty()) return wrong;
  std::vector<BF16> halves(64);
  launch(halves_kernel, {1, 64}, nullptr, halves.data());
  return halves[63].bits == 63 ? "" : "wrong halves";
}

}  // namespace

std::vector<Case> report_cases() { return {{"reports", run_reports, {}}}; }

}  // namespace lorafuse::selftest

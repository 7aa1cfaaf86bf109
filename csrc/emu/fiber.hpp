// Cooperative threads: a stack each, switched by hand on x86-64 and by ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(LORAFUSE_EMU_UCONTEXT)
#define LORAFUSE_EMU_USE_UCONTEXT 1
#include <ucontext.h>
#endif

namespace lorafuse::emu {

// Runs `entry` on a stack of its own. The scheduler resumes it, it suspends itself, and it ends with finish().
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { give_stack_back(); }

  // `entry` must not return and must not let an exception out.
  void prepare(void (*entry)());
  // From the scheduler, until the fiber suspends or finishes.
  void resume();
  // Into the cache, before it is resumed.
  void fetch() const {
#ifndef LORAFUSE_EMU_USE_UCONTEXT
    const auto* top = static_cast<const uint8_t*>(stack_pointer_);
    for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(top + line, 1);
#endif
  }
  // From the fiber.
  void suspend() { leave(false); }
  [[noreturn]] void finish();
  // When it has finished.
  void give_stack_back();
  // First thing in `entry`.
  static void entered();

 private:
  void leave(bool for_good);

  uint8_t* stack_ = nullptr;
  void* fake_stack_ = nullptr;
#ifdef LORAFUSE_EMU_USE_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace lorafuse::emu

#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define LORAFUSE_EMU_ASAN 1
#endif

namespace lorafuse::emu {
namespace {

// Pages are taken from the system when they are touched. Accumulators of 128 floats and the sanitizer's red zones fit.
#ifdef LORAFUSE_EMU_ASAN
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 128 << 10;
#endif

// Stacks are kept for the next launch. Each has an inaccessible page below it.
std::vector<uint8_t*> free_stacks;

uint8_t* take_stack() {
  if (free_stacks.empty()) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    free_stacks.push_back(static_cast<uint8_t*>(memory) + page);
  }
  uint8_t* stack = free_stacks.back();
  free_stacks.pop_back();
#ifdef LORAFUSE_EMU_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  return stack;
}

// The scheduler, which runs on the caller's stack.
struct Scheduler {
  void* fake_stack = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
#ifdef LORAFUSE_EMU_USE_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
} scheduler;

void finish_switch([[maybe_unused]] void* fake_stack) {
#ifdef LORAFUSE_EMU_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

}  // namespace

#ifndef LORAFUSE_EMU_USE_UCONTEXT
// Keeps the callee-saved registers on the stack it leaves, and takes them from the one it goes to.
extern "C" void lorafuse_emu_switch(void** leave, void* enter);
asm(R"(
.text
.globl lorafuse_emu_switch
.hidden lorafuse_emu_switch
.type lorafuse_emu_switch, @function
lorafuse_emu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size lorafuse_emu_switch, .-lorafuse_emu_switch
)");
#endif

void Fiber::give_stack_back() {
  if (stack_) free_stacks.push_back(stack_);
  stack_ = nullptr;
}

void Fiber::prepare(void (*entry)()) {
  stack_ = take_stack();
  // Stacks are whole pages apart: were their ends, too, those of all threads would share few lines of the cache.
  const size_t unused = reinterpret_cast<uintptr_t>(stack_) / 4096 % 64 * 64;
#ifdef LORAFUSE_EMU_USE_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes - unused;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Where `entry` is returned to, 8 bytes off a 16-byte boundary as after a call; below it six registers.
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes - unused - 64);
  *top = reinterpret_cast<void*>(entry);
  top -= 6;
  std::memset(top, 0, 6 * sizeof(void*));
  stack_pointer_ = top;
#endif
}

void Fiber::resume() {
#ifdef LORAFUSE_EMU_ASAN
  __sanitizer_start_switch_fiber(&scheduler.fake_stack, stack_, kStackBytes);
#endif
#ifdef LORAFUSE_EMU_USE_UCONTEXT
  swapcontext(&scheduler.context, &context_);
#else
  lorafuse_emu_switch(&scheduler.stack_pointer, stack_pointer_);
#endif
#ifdef LORAFUSE_EMU_ASAN
  __sanitizer_finish_switch_fiber(scheduler.fake_stack, nullptr, nullptr);
#endif
}

void Fiber::entered() { finish_switch(nullptr); }

void Fiber::leave([[maybe_unused]] bool for_good) {
#ifdef LORAFUSE_EMU_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, scheduler.stack, scheduler.stack_bytes);
#endif
#ifdef LORAFUSE_EMU_USE_UCONTEXT
  swapcontext(&context_, &scheduler.context);
#else
  lorafuse_emu_switch(&stack_pointer_, scheduler.stack_pointer);
#endif
  finish_switch(fake_stack_);
}

void Fiber::finish() {
  leave(true);
  std::abort();
}

}  // namespace lorafuse::emu

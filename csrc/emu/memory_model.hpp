// Which accesses to shared and global memory are ordered, and which are not.
//
// Both memories have a shadow: per 4-byte word its last write and its last two readers. A 128-byte line of shared
// memory that only TMA has written and wgmma has read keeps one entry for all its words. A new access is compared with
// the entries by the clock of its thread. Only accesses through the wrappers are seen.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "clock.hpp"

namespace lorafuse::emu {

struct Thread;
struct Block;

struct Word {
  Access write;
  // Of two agents, the latest of each.
  std::array<Access, 2> reads;
};

enum class Proxy { kGeneric, kAsync };

// The same, and a proxy fence lies between a generic `access` and the thread's asynchronous one. Of shared memory the
// fence must be the writer's (of copies that an mbarrier counts, the reader's after its wait); of global memory the
// thread's own, after it has acquired, will do.
bool proxy_fenced(const Thread& thread, const Access& access, bool shared);

// Keeps a read by `thread`.
void add_read(const Thread& thread, Word& word, Access access);
// Both touch the same half of a word.
inline bool overlap(const Access& a, const Access& b) { return (a.halves & b.halves) != 0; }

// Of one block's shared memory.
class SharedShadow {
 public:
  static constexpr uint32_t kLineBytes = 128;

  // Of a block that starts, with memory up to `end`.
  void reset(const Block& block, uint32_t end);

  // Ordinary accesses, cp.async, ldmatrix, stmatrix.
  void read(Thread& thread, uint32_t address, uint32_t bytes);
  void write(Thread& thread, uint32_t address, uint32_t bytes, const Access& access);
  // cp.async has been waited for, or has landed where an mbarrier counts it: `access` is what its write counts as.
  void retire_copy(const Access& access, uint32_t address, uint32_t bytes);

  // wgmma and TMA stores: from when they are issued until they are known to have read.
  void begin_async_read(Thread& thread, uint32_t line, const char* who);
  void end_async_read(Thread& thread, uint32_t line);
  // TMA loads. `time` is that of the mbarrier.
  void begin_load(Thread& thread, uint32_t line);
  void end_load(uint32_t line, Agent agent, uint32_t time);

 private:
  struct Line {
    Access write;
    // By wgmma and TMA stores.
    std::vector<Access> readers;
    uint16_t reading = 0;
    bool loading = false;
    // The words have entries of their own, and `write` is not used.
    bool split = false;
    // Where those are in `words_`, once the line was split.
    uint32_t words = kNone;
  };
  using Words = std::array<Word, kLineBytes / 4>;
  static constexpr uint32_t kNone = UINT32_MAX;

  void split(uint32_t line);
  Words& words(uint32_t line) { return words_[lines_[line].words]; }
  Word& word(uint32_t number) { return words(number / 32)[number % 32]; }
  void check_idle(uint32_t line, const char* what) const;

  const Block* block_ = nullptr;
  std::vector<Line> lines_;
  // Of lines that were split.
  std::vector<Words> words_;
};

// Of global memory, by pages.
class GlobalShadow {
 public:
  void read(Thread& thread, const void* p, size_t bytes, Proxy proxy, const Access& access);
  void write(Thread& thread, const void* p, size_t bytes, const Access& access);
  // A TMA store is complete.
  void retire_store(Thread& thread, const void* p, size_t bytes);

  // Before a launch: what the last one did is over, or, where the new one overlaps it, still to be waited for.
  void new_launch(bool overlaps, bool keep_earlier);
  void declare(const void* begin, size_t bytes, const std::string& name, bool unwritten);
  size_t unwritten_words(const void* begin, size_t bytes);
  void forget();
  // "xa + 128", or the address.
  std::string describe(const void* p) const;

 private:
  static constexpr uintptr_t kPageBytes = 4096;
  static constexpr uintptr_t kPageWords = kPageBytes / 4;
  using Page = std::array<Word, kPageWords>;
  struct Region {
    uintptr_t begin, end;
    std::string name;
    // One a word where the region was declared unwritten.
    std::vector<bool> unwritten;
  };

  Page& page(uintptr_t number);
  void forget_pages();
  Region* region(uintptr_t begin, size_t bytes, const char* what);
  template <class F>
  void each_word(const void* p, size_t bytes, F&& f);

  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> free_pages_;
  // By the low bits of the page's number.
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::array<Recent, 256> recent_;
  std::vector<Region> regions_;
};

extern GlobalShadow global_shadow;

}  // namespace lorafuse::emu

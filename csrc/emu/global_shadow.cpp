#include <algorithm>

#include "engine.hpp"
#include "memory_model.hpp"

namespace lorafuse::emu {

GlobalShadow global_shadow;

GlobalShadow::Page& GlobalShadow::page(uintptr_t number) {
  Recent& recent = recent_[number % recent_.size()];
  if (recent.page && recent.number == number) return *recent.page;
  std::unique_ptr<Page>& entry = pages_[number];
  if (!entry) {
    if (free_pages_.empty()) {
      entry = std::make_unique<Page>();
    } else {
      entry = std::move(free_pages_.back());
      free_pages_.pop_back();
      entry->fill(Word{});
    }
  }
  recent = {number, entry.get()};
  return *entry;
}

GlobalShadow::Region* GlobalShadow::region(uintptr_t begin, size_t bytes, const char* what) {
  if (regions_.empty()) return nullptr;
  for (Region& region : regions_) {
    if (begin >= region.begin && begin + bytes <= region.end) return &region;
  }
  fail(what, " of ", bytes, " bytes at ", describe(reinterpret_cast<const void*>(begin)),
       " is outside of every declared buffer");
}

// Calls f(word, halves, number of the word in memory).
template <class F>
void GlobalShadow::each_word(const void* p, size_t bytes, F&& f) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + bytes;
  for (uintptr_t at = begin; at < end;) {
    Page& words = page(at / kPageBytes);
    const uintptr_t page_end = std::min(end, (at | (kPageBytes - 1)) + 1);
    while (at < page_end) {
      const uintptr_t next = std::min(page_end, (at | 3) + 1);
      const uint32_t halves = (at % 4 < 2 ? 1 : 0) | ((next - 1) % 4 >= 2 ? 2 : 0);
      f(words[at % kPageBytes / 4], halves, at / 4);
      at = next;
    }
  }
}

void GlobalShadow::read(Thread& thread, const void* p, size_t bytes, Proxy proxy, const Access& access) {
  if (!checks()) return;
  const Region* declared = region(reinterpret_cast<uintptr_t>(p), bytes, "read");
  const char* what = proxy == Proxy::kAsync ? "TMA load" : "read";
  each_word(p, bytes, [&](Word& word, uint32_t halves, uintptr_t number) {
    const Access& write = word.write;
    Access entry = access;
    entry.halves = halves;
    if (write && overlap(write, entry)) {
      const void* at = reinterpret_cast<const void*>(number * 4);
      if (write.state == Access::kInFlight) {
        fail("race: ", what, " of ", describe(at), ", to which a TMA store of ", emu::describe(write),
             " has not been waited for");
      }
      if (!ordered_after(thread, write)) {
        fail("race: ", what, " of ", describe(at), " is not ordered after the write by ", emu::describe(write));
      }
      if (proxy == Proxy::kAsync && !proxy_fenced(thread, write, false)) {
        fail("proxy: TMA load of ", describe(at), ", which ", emu::describe(write),
             " wrote with ordinary stores, without a fence_proxy_async between");
      }
    } else if (declared && !declared->unwritten.empty() && declared->unwritten[number - declared->begin / 4]) {
      fail(what, " of ", describe(reinterpret_cast<const void*>(number * 4)), ", which nobody has written");
    }
    add_read(thread, word, entry);
  });
}

void GlobalShadow::write(Thread& thread, const void* p, size_t bytes, const Access& access) {
  if (!checks()) return;
  Region* declared = region(reinterpret_cast<uintptr_t>(p), bytes, "write");
  each_word(p, bytes, [&](Word& word, uint32_t halves, uintptr_t number) {
    const void* at = reinterpret_cast<const void*>(number * 4);
    Access entry = access;
    entry.halves = halves;
    if (word.write && overlap(word.write, entry)) {
      if (word.write.state == Access::kInFlight) {
        fail("race: write of ", describe(at), ", to which a TMA store of ", emu::describe(word.write),
             " has not been waited for");
      }
      if (!ordered_after(thread, word.write)) {
        fail("race: write of ", describe(at), " is not ordered after the write by ", emu::describe(word.write));
      }
      if (access.async && !proxy_fenced(thread, word.write, false)) {
        fail("proxy: TMA store to ", describe(at), ", which ", emu::describe(word.write),
             " wrote with ordinary stores, without a fence_proxy_async between");
      }
    }
    for (const Access& read : word.reads) {
      if (read && overlap(read, entry) && !ordered_after(thread, read)) {
        fail("race: write of ", describe(at), " is not ordered after the read by ", emu::describe(read));
      }
    }
    word.write = entry;
    word.reads = {};
    if (declared && !declared->unwritten.empty()) declared->unwritten[number - declared->begin / 4] = false;
  });
}

void GlobalShadow::retire_store(Thread& thread, const void* p, size_t bytes) {
  if (!checks()) return;
  const Access access = access_of(thread, Proxy::kAsync);
  each_word(p, bytes, [&](Word& word, uint32_t halves, uintptr_t) {
    if (word.write.state != Access::kInFlight) return;
    word.write = access;
    word.write.halves = halves;
  });
}

void GlobalShadow::new_launch(bool overlaps, bool keep_earlier) {
  if (!overlaps) {
    forget_pages();
    return;
  }
  const auto turn = [&](Access& access) {
    if (!access) return;
    const bool earlier = access.agent == Access::kPreviousLaunch;
    if (earlier && !keep_earlier) {
      access = Access{};
    } else {
      access.agent = Access::kPreviousLaunch;
      access.state = Access::kDone;
    }
  };
  for (auto& [number, page] : pages_) {
    for (Word& word : *page) {
      turn(word.write);
      for (Access& read : word.reads) turn(read);
    }
  }
}

void GlobalShadow::declare(const void* begin, size_t bytes, const std::string& name, bool unwritten) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  Region region{address, address + bytes, name, {}};
  if (unwritten) region.unwritten.assign((address + bytes + 3) / 4 - address / 4, true);
  // memory that was freed and allocated anew
  std::erase_if(regions_, [&](const Region& old) { return old.begin < region.end && region.begin < old.end; });
  regions_.push_back(std::move(region));
}

size_t GlobalShadow::unwritten_words(const void* begin, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  for (const Region& region : regions_) {
    if (address < region.begin || address + bytes > region.end || region.unwritten.empty()) continue;
    const auto first = region.unwritten.begin() + static_cast<ptrdiff_t>(address / 4 - region.begin / 4);
    return static_cast<size_t>(std::count(first, first + static_cast<ptrdiff_t>((bytes + 3) / 4), true));
  }
  return 0;
}

void GlobalShadow::forget() {
  regions_.clear();
  forget_pages();
}

void GlobalShadow::forget_pages() {
  recent_ = {};
  for (auto& [number, page] : pages_) free_pages_.push_back(std::move(page));
  pages_.clear();
}

std::string GlobalShadow::describe(const void* p) const {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  for (const Region& region : regions_) {
    if (address >= region.begin && address < region.end) {
      return region.name + " + " + std::to_string(address - region.begin) + " bytes";
    }
  }
  return "global memory at " + hex(address);
}

}  // namespace lorafuse::emu

#include "memory_model.hpp"

#include <algorithm>

#include "engine.hpp"

namespace lorafuse::emu {

namespace {

// Where the fence belongs that is missing.
const char* unfenced(const Access& write) {
  return engine->is_mbarrier(write.agent) ? " wrote with no fence_proxy_async_shared after the wait for it"
                                          : " wrote with no fence_proxy_async_shared before the barrier";
}

}  // namespace

bool proxy_fenced(const Thread& thread, const Access& access, bool shared) {
  if (access.async || access.agent == Access::kPreviousLaunch) return true;
  // Copies that an mbarrier counted: no fence of the thread that issued them comes after their writes, so that whoever
  // has waited for them has to have one.
  if (shared && engine->is_mbarrier(access.agent)) return thread.proxied_shared.at(access.agent) >= access.time;
  // A fence of the writer, after the write and before the release that told of it.
  const bool own = access.agent == thread.warp->agent && access.lane == thread.lane;
  const uint32_t told = own ? UINT32_MAX : thread.clock.at(access.agent);
  const auto fenced = [&](const Times& fences) {
    const auto fence = std::lower_bound(fences.begin(), fences.end(), access.time);
    return fence != fences.end() && *fence <= told;
  };
  const LaneFences& fences = engine->warp_of(access.agent).fences[access.lane];
  if (fenced(fences.all) || (shared && fenced(fences.shared))) return true;
  return !shared && thread.has_proxied && thread.proxied.at(access.agent) >= access.time;
}

void add_read(const Thread& thread, Word& word, Access access) {
  Access* slot = &word.reads[0];
  for (Access& read : word.reads) {
    if (!read || read.agent == access.agent) {
      slot = &read;
      access.lanes = read && read.agent == thread.warp->agent && !ordered_after(thread, read);
      break;
    }
    if (read.time < slot->time) slot = &read;
  }
  *slot = access;
}

void SharedShadow::reset(const Block& block, uint32_t end) {
  block_ = &block;
  words_.clear();
  lines_.resize((end + kLineBytes - 1) / kLineBytes);
  for (Line& line : lines_) {
    line.write = {};
    line.readers.clear();
    line.reading = 0;
    line.loading = line.split = false;
    line.words = kNone;
  }
}

void SharedShadow::split(uint32_t line) {
  Line& state = lines_[line];
  if (state.split) return;
  if (state.words == kNone) {
    state.words = static_cast<uint32_t>(words_.size());
    words_.emplace_back();
  }
  Word word;
  word.write = state.write;
  words(line).fill(word);
  state.split = true;
}

void SharedShadow::check_idle(uint32_t line, const char* what) const {
  if (lines_[line].loading) {
    fail("race: ", what, " of ", describe_shared(*block_, line * kLineBytes), " while a TMA load into it is in flight");
  }
}

void SharedShadow::read(Thread& thread, uint32_t address, uint32_t bytes) {
  if (!checks()) return;
  const Access access = access_of(thread);
  for (uint32_t word = address / 4; word < (address + bytes + 3) / 4; ++word) {
    const uint32_t line = word / 32;
    check_idle(line, "read");
    split(line);
    Word& entry = this->word(word);
    const Access& write = entry.write;
    if (!write) fail("read of ", describe_shared(*block_, word * 4), ", which nobody has written");
    if (write.state == Access::kInFlight) {
      fail("read of ", describe_shared(*block_, word * 4), " before the copy_async of ", describe(write),
           " into it was waited for");
    }
    if (!ordered_after(thread, write)) {
      fail("race: read of ", describe_shared(*block_, word * 4), " is not ordered after the write by ",
           describe(write));
    }
    if (!write.async && write.agent / engine->agents_per_block != static_cast<uint32_t>(block_->number) &&
        thread.cluster_clock.at(write.agent) < write.time) {
      fail("race: read of ", describe_shared(*block_, word * 4), ", which ", describe(write),
           " has stored, with no cluster_sync between");
    }
    add_read(thread, entry, access);
  }
}

void SharedShadow::write(Thread& thread, uint32_t address, uint32_t bytes, const Access& access) {
  if (!checks()) return;
  for (uint32_t at = address; at < address + bytes;) {
    const uint32_t word = at / 4, line = word / 32;
    const uint32_t end = std::min(address + bytes, word * 4 + 4);
    Access entry = access;
    entry.halves = (at % 4 < 2 ? 1 : 0) | (end % 4 == 0 || end % 4 > 2 ? 2 : 0);
    at = end;
    check_idle(line, "write");
    if (lines_[line].reading) {
      fail("race: write of ", describe_shared(*block_, word * 4),
           " while a wgmma or TMA store that reads it has not been waited for");
    }
    for (const Access& read : lines_[line].readers) {
      if (!ordered_after(thread, read)) {
        fail("race: write of ", describe_shared(*block_, word * 4), " is not ordered after the asynchronous read by ",
             describe(read));
      }
    }
    split(line);
    Word& shadow = this->word(word);
    if (shadow.write && overlap(shadow.write, entry)) {
      if (shadow.write.state == Access::kInFlight) {
        fail("race: write of ", describe_shared(*block_, word * 4), " before the copy_async of ",
             describe(shadow.write), " into it was waited for");
      }
      if (!ordered_after(thread, shadow.write)) {
        fail("race: write of ", describe_shared(*block_, word * 4), " is not ordered after the write by ",
             describe(shadow.write));
      }
    }
    for (const Access& read : shadow.reads) {
      if (read && overlap(read, entry) && !ordered_after(thread, read)) {
        fail("race: write of ", describe_shared(*block_, word * 4), " is not ordered after the read by ",
             describe(read));
      }
    }
    shadow.write = entry;
    shadow.reads = {};
  }
}

void SharedShadow::retire_copy(const Access& access, uint32_t address, uint32_t bytes) {
  if (!checks()) return;
  for (uint32_t word = address / 4; word < (address + bytes) / 4; ++word) this->word(word).write = access;
}

void SharedShadow::begin_async_read(Thread& thread, uint32_t line, const char* who) {
  Line& state = lines_[line];
  const auto check = [&](const Access& write, uint32_t address) {
    if (!write) fail(who, " reads ", describe_shared(*block_, address), ", which nobody has written");
    if (write.state == Access::kInFlight) {
      fail(who, " reads ", describe_shared(*block_, address), " before the copy_async of ", describe(write),
           " into it was waited for");
    }
    if (!ordered_after(thread, write)) {
      fail("race: ", who, " reads ", describe_shared(*block_, address), ", not ordered after the write by ",
           describe(write));
    }
    if (!proxy_fenced(thread, write, true)) {
      fail("proxy: ", who, " reads ", describe_shared(*block_, address), ", which ", describe(write),
           unfenced(write));
    }
  };
  if (state.loading) {
    fail("race: ", who, " reads ", describe_shared(*block_, line * kLineBytes),
         " while a TMA load into it is in flight");
  }
  if (state.split) {
    for (uint32_t i = 0; i < kLineBytes / 4; ++i) check(words(line)[i].write, line * kLineBytes + 4 * i);
  } else {
    check(state.write, line * kLineBytes);
  }
  ++state.reading;
}

void SharedShadow::end_async_read(Thread& thread, uint32_t line) {
  Line& state = lines_[line];
  --state.reading;
  const Access access = access_of(thread, Proxy::kAsync);
  for (Access& read : state.readers) {
    if (read.agent == access.agent) {
      read = access;
      return;
    }
  }
  state.readers.push_back(access);
}

void SharedShadow::begin_load(Thread& thread, uint32_t line) {
  Line& state = lines_[line];
  const auto where = [&](uint32_t word) { return describe_shared(*block_, line * kLineBytes + 4 * word); };
  if (state.reading) {
    fail("race: TMA load into ", where(0), " while a wgmma or TMA store that reads it has not been waited for");
  }
  if (state.loading) fail("race: TMA load into ", where(0), " while another one into it is in flight");
  for (const Access& read : state.readers) {
    if (!ordered_after(thread, read)) {
      fail("race: TMA load into ", where(0), " is not ordered after the read by ", describe(read));
    }
  }
  const auto check = [&](const Access& write, uint32_t word) {
    if (!write) return;
    if (write.state == Access::kInFlight) fail("race: TMA load into ", where(word), " while a copy_async writes it");
    if (!ordered_after(thread, write)) {
      fail("race: TMA load into ", where(word), " is not ordered after the write by ", describe(write));
    }
    if (!proxy_fenced(thread, write, true)) {
      fail("proxy: TMA load into ", where(word), ", which ", describe(write),
           unfenced(write));
    }
  };
  if (state.split) {
    for (uint32_t i = 0; i < kLineBytes / 4; ++i) {
      const Word& word = words(line)[i];
      check(word.write, i);
      for (const Access& read : word.reads) {
        if (read && !ordered_after(thread, read)) {
          fail("race: TMA load into ", where(i), " is not ordered after the read by ", describe(read));
        }
      }
    }
  } else {
    check(state.write, 0);
  }
  state.loading = true;
}

void SharedShadow::end_load(uint32_t line, Agent agent, uint32_t time) {
  Line& state = lines_[line];
  state.loading = false;
  state.split = false;
  state.readers.clear();
  state.write = Access{};
  state.write.agent = agent;
  state.write.time = time;
  state.write.async = 1;
}

}  // namespace lorafuse::emu

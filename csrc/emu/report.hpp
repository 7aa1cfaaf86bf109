// How errors are worded.
#pragma once

#include <sstream>

namespace lorafuse::emu {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  fail_with(text.str());
}

}  // namespace lorafuse::emu

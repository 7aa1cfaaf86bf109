// Which bug of woven headers is on (tests/planted.py): the one that the environment names.
#include <cstdlib>
#include <string_view>

namespace lorafuse::emu {

bool any_planted = true;

bool is_planted(const char* name) {
  static const char* const on = std::getenv("PLANTED");
  return on && std::string_view(name) == on;
}

}  // namespace lorafuse::emu

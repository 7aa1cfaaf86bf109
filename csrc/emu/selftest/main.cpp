// `selftest list` prints the names of the cases; `selftest CASE [SEEDS]` runs one, right and with each of its bugs.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

// What the run says: "" where all is well.
std::string attempt(const Case& test, uint64_t seed, const char* planted) {
  emu::Config config;
  config.seed = seed;
  config.resident = test.resident;
  config.planted = planted;
  emu::configure(config);
  try {
    return test.run();
  } catch (const std::exception& error) {
    return error.what();
  }
}

// Whether the right kernel passes, and every bug is seen.
bool run_case(const Case& test, int seeds) {
  bool good = true;
  for (int seed = 0; seed < seeds; ++seed) {
    const std::string said = attempt(test, static_cast<uint64_t>(seed), "");
    if (said.empty()) continue;
    std::printf("FAIL %s, seed %d: %s\n", test.name, seed, said.c_str());
    good = false;
    break;
  }
  // each bug under fewer seeds: seeing it is a property of the checks more than of the schedule
  const int bug_seeds = std::max(seeds / 10, 10);
  for (const Bug& bug : test.bugs) {
    int seen = 0;
    std::string first, other;
    bool reached = true;
    for (int seed = 0; seed < bug_seeds; ++seed) {
      const std::string said = attempt(test, static_cast<uint64_t>(seed), bug.name);
      reached = reached && emu::statistics().planted_reached;
      if (said.empty()) continue;
      if (first.empty()) first = said;
      if (said.find(bug.report) != std::string::npos) {
        ++seen;
      } else {
        other = said;
      }
    }
    const bool enough = reached && seen * 100 >= bug.seen * bug_seeds;
    good = good && enough;
    std::printf("%s %s [%s]: seen under %d of %d seeds%s; %s\n", enough ? "ok" : "FAIL", test.name, bug.name, seen,
                bug_seeds, reached ? "" : ", not reached", (enough || other.empty() ? first : other).c_str());
  }
  if (good) std::printf("ok %s: %d seeds, %zu bugs\n", test.name, seeds, test.bugs.size());
  return good;
}

}  // namespace
}  // namespace lorafuse::selftest

int main(int count, char** arguments) {
  using namespace lorafuse::selftest;
  std::vector<Case> cases;
  for (const auto& some :
       {ring_cases(), store_cases(), warp_cases(), copies_cases(), registers_cases(), boxes_cases(), order_cases(),
        report_cases()}) {
    cases.insert(cases.end(), some.begin(), some.end());
  }
  const std::string wanted = count > 1 ? arguments[1] : "";
  if (wanted == "list") {
    for (const Case& test : cases) std::printf("%s\n", test.name);
    return EXIT_SUCCESS;
  }
  bool good = true, found = false;
  for (const Case& test : cases) {
    if (!wanted.empty() && wanted != test.name) continue;
    found = true;
    good = run_case(test, count > 2 ? std::atoi(arguments[2]) : 200) && good;
  }
  if (!found) std::printf("no case is called '%s'\n", wanted.c_str());
  return good && found ? EXIT_SUCCESS : EXIT_FAILURE;
}

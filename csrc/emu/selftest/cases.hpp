// The emulator's own tests: small kernels, right ones that must pass under every seed, and the same with a planted bug,
// which must be reported.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <lorafuse/common.cuh>

#include "../emulator.hpp"
#include "../numbers.hpp"

namespace lorafuse::selftest {

struct Bug {
  const char* name;
  // Must be part of the report, or of what `run` says of the values.
  const char* report;
  // Percent of the seeds that must see it.
  int seen = 100;
};

struct Case {
  const char* name;
  // Launches, and returns what is wrong with the result; throws what the emulator reports.
  std::string (*run)();
  std::vector<Bug> bugs;
  // Blocks that run at a time; 0: all.
  int resident = 0;
};

std::vector<Case> ring_cases();
std::vector<Case> store_cases();
std::vector<Case> warp_cases();
std::vector<Case> copies_cases();
std::vector<Case> registers_cases();
std::vector<Case> boxes_cases();
std::vector<Case> order_cases();
std::vector<Case> report_cases();

// Numbers from -1 to 1, the same in every run.
template <class T>
std::vector<T> numbers(size_t count, uint32_t seed) {
  constexpr emu::Element element = std::is_same_v<T, BF16> ? emu::Element::kBF16 : emu::Element::kFP16;
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 1664525 + 1013904223;
    value.bits = emu::to_bits(element, static_cast<float>(static_cast<int>(seed >> 16) % 2001 - 1000) / 1000.0f);
  }
  return values;
}

template <class T>
float value_of(T element) {
  return emu::to_float(std::is_same_v<T, BF16> ? emu::Element::kBF16 : emu::Element::kFP16, element.bits);
}

// a b, with a [m, k] and b [n, k] or, transposed, [k, n].
template <class T>
std::vector<double> product(const std::vector<T>& a, const std::vector<T>& b, int m, int n, int k, bool transposed) {
  std::vector<double> d(m * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      for (int l = 0; l < k; ++l) {
        const T other = transposed ? b[l * n + j] : b[j * k + l];
        d[i * n + j] += static_cast<double>(value_of(a[i * k + l])) * value_of(other);
      }
    }
  }
  return d;
}

// "" or where and by how much `found` is off.
inline std::string compare(const std::vector<float>& found, const std::vector<double>& expected, double tolerance) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(static_cast<double>(found[i]) - expected[i]);
    if (!(error <= tolerance * (1 + std::fabs(expected[i])))) {
      return "wrong value at " + std::to_string(i) + ": " + std::to_string(found[i]) + ", expected " +
             std::to_string(expected[i]);
    }
  }
  return "";
}

}  // namespace lorafuse::selftest

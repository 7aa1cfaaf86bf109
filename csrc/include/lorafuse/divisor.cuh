// Division by a number that is known at the launch, for kernels: a multiplication and a shift.
#pragma once

#include <lorafuse/common.cuh>

namespace lorafuse {

// n / divisor for 0 <= n < 2^31 and 1 <= divisor < 2^31 (Granlund and Montgomery 1994, figure 4.1; below 2^31 its sum
// does not overflow).
struct Divisor {
  uint32_t divisor, magic, shift;

  static constexpr Divisor of(int64_t divisor) {
    uint32_t shift = 0;
    while (int64_t{1} << shift < divisor) ++shift;
    const uint64_t beyond = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
    const uint64_t magic = (beyond << 32) / static_cast<uint64_t>(divisor) + 1;
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(magic), shift};
  }
  LF_HOST_DEVICE constexpr uint32_t quotient(uint32_t n) const {
    return (static_cast<uint32_t>(static_cast<uint64_t>(n) * magic >> 32) + n) >> shift;
  }
};

}  // namespace lorafuse

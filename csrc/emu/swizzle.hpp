// How TMA and wgmma permute 16-byte pieces of shared memory.
#pragma once

#include <cstdint>

namespace lorafuse::emu {

// By the bytes within which pieces change places: a row of a box, or of a matrix that a descriptor gives.
enum class Swizzle : uint32_t { kNone = 0, k32 = 32, k64 = 64, k128 = 128 };

// Bits of an address from the fourth on, which take those from the seventh on by exclusive or.
constexpr uint32_t swizzle_mask(Swizzle swizzle) {
  return swizzle == Swizzle::kNone ? 0 : static_cast<uint32_t>(swizzle) - 16;
}
constexpr uint32_t swizzled(uint32_t address, uint32_t mask) { return address ^ (address >> 3 & mask); }
// Bytes after which the pattern begins again; without one, the boundary that TMA needs.
constexpr uint32_t swizzle_period(Swizzle swizzle) { return (swizzle_mask(swizzle) << 3) + 128; }

}  // namespace lorafuse::emu

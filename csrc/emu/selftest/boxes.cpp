// Boxes of other widths than 64 elements: where their elements lie, and products of what they bring.
#include <lorafuse/ptx/launch.cuh>
#include <lorafuse/ptx/memory.cuh>
#include <lorafuse/ptx/wgmma.cuh>

#include "cases.hpp"

namespace lorafuse::selftest {
namespace {

using emu::Swizzle;
using ptx::Major;
using ptx::TensorMap;

constexpr int kBoxRows = 48, kRows = 70, kColumns = 88;

struct BoxArguments {
  int x, y, width, span;
  BF16* out;
};

// Loads a box and writes it twice: element by element to `out` [kBoxRows, width], and by TMA to its place in another
// tensor.
LF_KERNEL(32)
box_kernel(LF_GRID_CONSTANT TensorMap map_from, LF_GRID_CONSTANT TensorMap map_to, const BoxArguments p) {
  LF_DYNAMIC_SHARED(raw);
  uint8_t* box = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint64_t* full = reinterpret_cast<uint64_t*>(box + 64 * 128);
  if (LF_PLANTED("box: off the boundary")) box += p.span == 0 ? 64 : 128;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(full, kBoxRows * (LF_PLANTED("box: expects rows of 128 bytes") ? 128 : p.width * 2));
    ptx::tma_load(box, &map_from, p.x, p.y, full);
  }
  ptx::warp_sync();
  if (!LF_PLANTED("box: no wait")) ptx::mbarrier_wait(full, 0);
  for (int i = static_cast<int>(threadIdx.x); i < kBoxRows * p.width; i += 32) {
    // the programming guide's table: 16-byte piece `piece` of line `line` of 128 bytes, of as many pieces as a row has
    const int line = i * 2 / 128, piece = i / 8 % 8;
    const int pieces = LF_PLANTED("box: swizzle of 128 bytes") ? 8 : p.span == 0 ? 1 : p.span / 16;
    const int place = line * 128 + (line % pieces ^ piece) * 16 + i % 8 * 2;
    ptx::store_global(p.out + i, ptx::load_shared<BF16>(box + place));
  }
  if (threadIdx.x == 0) {
    ptx::tma_store(&map_to, box, p.x, p.y);
    ptx::tma_store_commit();
    ptx::tma_store_wait_read<0>();
  }
}

// Inside the tensor, and over its edges.
std::string run_box(int width, Swizzle swizzle) {
  static const std::vector<BF16> from = numbers<BF16>(kRows * kColumns, 9);
  for (const auto& [x, y] : {std::pair(0, 0), std::pair(kColumns - 6, kRows - 40), std::pair(-2, -5)}) {
    std::vector<BF16> to(from.size(), BF16{0x7fff}), out(kBoxRows * width);
    emu::forget_memory();
    const auto map = [&](const std::vector<BF16>& tensor) {
      return encode_tensor_map<BF16, 2>(tensor.data(), {kColumns, kRows}, {2 * kColumns}, {width, kBoxRows}, swizzle);
    };
    launch(box_kernel, {1, 32, 1024 + 64 * 128 + 8}, nullptr, map(from), map(to),
           BoxArguments{x, y, width, static_cast<int>(swizzle), out.data()});
    for (int row = 0; row < kBoxRows; ++row) {
      for (int column = 0; column < width; ++column) {
        const int m = y + row, n = x + column, at = m * kColumns + n;
        const bool inside = m >= 0 && m < kRows && n >= 0 && n < kColumns;
        if (out[row * width + column].bits != (inside ? from[at].bits : 0)) return "wrong value in shared memory";
        if (!inside) continue;
        if (to[at].bits != from[at].bits) return "wrong value in the other tensor";
        to[at].bits = 0x7fff;
      }
    }
    for (const BF16 element : to) {
      if (element.bits != 0x7fff) return "an element outside of the box was written";
    }
  }
  return "";
}

std::string run_plain_boxes() {
  for (const int width : {8, 16, 32, 64}) {
    const std::string wrong = run_box(width, Swizzle::kNone);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::string run_swizzled_boxes() {
  for (const Swizzle swizzle : {Swizzle::k32, Swizzle::k64, Swizzle::k128}) {
    const std::string wrong = run_box(static_cast<int>(swizzle) / 2, swizzle);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// What is no map, and why.
std::string run_refusals() {
  alignas(16) static BF16 tensor[64 * 64];
  struct Refusal {
    int width, rows;
    Swizzle swizzle;
    const char* reason;
  };
  for (const Refusal& bad : {
           Refusal{32, 48, Swizzle::k32, "32 elements is wider than the 32 bytes of its swizzle"},
           Refusal{24, 48, Swizzle::k32, "24 elements is wider than the 32 bytes of its swizzle"},
           Refusal{64, 48, Swizzle::k64, "64 elements is wider than the 64 bytes of its swizzle"},
           Refusal{72, 48, Swizzle::k128, "72 elements is wider than the 128 bytes of its swizzle"},
           Refusal{72, 48, Swizzle::kNone, "72 elements is wider than the 128 bytes that the emulator models"},
           Refusal{12, 48, Swizzle::kNone, "12 elements is not a multiple of 16 bytes"},
           Refusal{12, 48, Swizzle::k32, "12 elements is not a multiple of 16 bytes"},
           Refusal{1, 64, Swizzle::k128, "1 elements is not a multiple of 16 bytes"},
           Refusal{0, 64, Swizzle::kNone, "box of 0 elements is not in 1 … 256"},
           Refusal{8, 48, Swizzle::k32, "8 elements is narrower than the 32-byte swizzle"},
           Refusal{16, 48, Swizzle::k128, "16 elements is narrower than the 128-byte swizzle"},
           Refusal{8, 12, Swizzle::kNone, "box of 192 bytes"},
       }) {
    std::string reason = "nothing";
    try {
      encode_tensor_map<BF16, 2>(tensor, {64, 64}, {128}, {bad.width, bad.rows}, bad.swizzle);
    } catch (const std::exception& error) {
      reason = error.what();
    }
    if (reason.find(bad.reason) == std::string::npos) return "'" + std::string(bad.reason) + "' is not in: " + reason;
  }
  return "";
}

// As the PTX manual gives it: written here once more, not taken from layout.cuh.
uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, int span) {
  const uint64_t mode = span == 0 ? 0 : span == 32 ? 3 : span == 64 ? 2 : 1;
  return (address >> 4) | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         mode << 62;
}

// An operand, 64 of d's rows or columns and 64 of the reduction, in boxes of rows of `kSpan` bytes, or of 16 without a
// swizzle.
template <Major kMajor, int kSpan>
struct Operand {
  static constexpr int kRowBytes = kSpan == 0 ? 16 : kSpan, kWidth = kRowBytes / 2, kBytes = 64 * 128;
  static constexpr uint32_t kBox = 64 * kRowBytes, kCore = 8 * kRowBytes;

  static void load(uint8_t* to, const TensorMap* map, uint64_t* full) {
    for (int i = 0; i < 64 / kWidth; ++i) ptx::tma_load(to + i * kBox, map, i * kWidth, 0, full);
  }
  // Of reduction indices from 16 step on.
  static uint64_t at(uint32_t address, int step) {
    const bool swapped = LF_PLANTED("narrow: offsets change places"), other = LF_PLANTED("narrow: another swizzle");
    uint32_t leading = kBox, stride = kCore;
    if constexpr (kMajor == Major::MN) {
      address += 16 * step * kRowBytes;
      // without a swizzle the two have each other's meaning
      if (kSpan == 0) std::swap(leading, stride);
    } else {
      address += 16 * step / kWidth * kBox + 16 * step % kWidth * 2;
    }
    if (swapped) std::swap(leading, stride);
    return descriptor(address, leading, stride, other ? (kSpan == 0 ? 32 : 0) : kSpan);
  }
};

// d[64, 64] = a b of one block.
template <class T, Major kMajor, int kSpan>
LF_KERNEL(128)
narrow_kernel(LF_GRID_CONSTANT TensorMap map_a, LF_GRID_CONSTANT TensorMap map_b, float* out) {
  using A = Operand<Major::K, kSpan>;
  using B = Operand<kMajor, kSpan>;
  LF_DYNAMIC_SHARED(raw);
  uint8_t* a = raw + (1024 - ptx::shared_address(raw) % 1024) % 1024;
  uint8_t* b = a + A::kBytes;
  uint64_t* full = reinterpret_cast<uint64_t*>(b + B::kBytes);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_arrive_expect(full, A::kBytes + B::kBytes);
    A::load(a, &map_a, full);
    B::load(b, &map_b, full);
  }
  ptx::block_sync();
  if (!LF_PLANTED("narrow: no wait")) ptx::mbarrier_wait(full, 0);
  float d[32];
  ptx::wgmma_fence();
  for (int step = 0; step < 4; ++step) {
    const uint32_t off = LF_PLANTED("narrow: inside the pattern") ? 128 : 0;
    ptx::wgmma<T, 64, kMajor>(d, A::at(ptx::shared_address(a) + off, step), B::at(ptx::shared_address(b), step),
                              step > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  for (int i = 0; i < 32; ++i) {
    const int m = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, n = i / 4 * 8 + lane % 4 * 2 + i % 2;
    ptx::store_global(out + m * 64 + n, d[i]);
  }
}

template <class T, Major kMajor, int kSpan>
std::string run_narrow() {
  static const std::vector<T> a = numbers<T>(64 * 64, 10), b = numbers<T>(64 * 64, 11);
  static const std::vector<double> expected = product(a, b, 64, 64, 64, kMajor == Major::MN);
  std::vector<float> d(64 * 64, NAN);
  emu::forget_memory();
  emu::declare_memory(a.data(), a.size() * 2, "a");
  emu::declare_memory(b.data(), b.size() * 2, "b");
  emu::declare_memory(d.data(), d.size() * 4, "d", true);
  const auto map = [](const std::vector<T>& tensor) {
    return encode_tensor_map<T, 2>(tensor.data(), {64, 64}, {128}, {Operand<kMajor, kSpan>::kWidth, 64},
                                   static_cast<Swizzle>(kSpan));
  };
  launch(narrow_kernel<T, kMajor, kSpan>, {1, 128, 1024 + 2 * 64 * 128 + 8}, nullptr, map(a), map(b), d.data());
  if (emu::unwritten_words(d.data(), d.size() * 4) > 0) return "words of d are not written";
  return compare(d, expected, 1e-5);
}

}  // namespace

std::vector<Case> boxes_cases() {
  const char* const wrong = "wrong value in shared memory";
  const std::vector<Bug> bugs = {{"narrow: no wait", "wgmma reads shared memory"},
                                 {"narrow: another swizzle", ""}};
  const auto also = [&](std::vector<Bug> more) {
    more.insert(more.end(), bugs.begin(), bugs.end());
    return more;
  };
  const Bug swapped{"narrow: offsets change places", ""};
  return {
      {"boxes without a swizzle", run_plain_boxes,
       {{"box: off the boundary", "off the 128-byte boundary of TMA"},
        {"box: expects rows of 128 bytes", "lacks 0 of 1 arrivals and"},
        {"box: no wait", ""},
        {"box: swizzle of 128 bytes", wrong}}},
      {"boxes with each swizzle", run_swizzled_boxes,
       {{"box: off the boundary", "the 32-byte swizzle repeats every 256 bytes and must start there"},
        {"box: expects rows of 128 bytes", "lacks 0 of 1 arrivals and"},
        {"box: swizzle of 128 bytes", wrong}}},
      {"boxes that are refused", run_refusals, {}},
      {"narrow K-major, no swizzle", run_narrow<BF16, Major::K, 0>, also({swapped})},
      {"narrow K-major, 32 bytes", run_narrow<FP16, Major::K, 32>,
       also({{"narrow: inside the pattern", "inside the 256 bytes of the swizzle's pattern"}})},
      {"narrow K-major, 64 bytes", run_narrow<BF16, Major::K, 64>,
       also({{"narrow: inside the pattern", "inside the 512 bytes of the swizzle's pattern"}})},
      {"narrow MN-major, no swizzle", run_narrow<FP16, Major::MN, 0>, also({swapped})},
      {"narrow MN-major, 32 bytes", run_narrow<BF16, Major::MN, 32>, also({swapped})},
      {"narrow MN-major, 64 bytes", run_narrow<FP16, Major::MN, 64>, also({swapped})},
  };
}

}  // namespace lorafuse::selftest

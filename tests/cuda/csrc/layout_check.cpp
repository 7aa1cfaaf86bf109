// Compares csrc/include/lorafuse/layout.cuh with what others say about the same layouts: tables transcribed from the
// PTX ISA manual, and CuTe's own layouts and descriptors where its headers are on the include path. The kernels and
// their emulator could share a mistake; these two cannot. Prints a line a check, `name: mismatches`; exits 1 where any
// is not 0.
#include <cstdio>

// before our headers: the emulator's define threadIdx
#if __has_include(<cute/tensor.hpp>)
#include <cuda_runtime.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#endif

#include <lorafuse/layout.cuh>

namespace {

using namespace lorafuse;

int total = 0;

void report(const char* name, int mismatches) {
  std::printf("%s: %d\n", name, mismatches);
  total += mismatches;
}

// ---- PTX ISA

// "Tensor swizzling modes", 128 bytes: which 16-byte piece of a row lies at each place, for rows 0 … 7.
constexpr int kPieces[8][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
                               {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
                               {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0}};

void check_swizzle() {
  int bad = 0;
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < 64; ++column) {
      const int offset = static_cast<int>(box_offset(row, column));
      const int piece = kPieces[row % 8][offset % 128 / 16];
      bad += offset / 128 != row || piece * 8 + offset % 16 / 2 != column || offset % 2 != 0;
    }
  }
  report("ptx swizzle", bad);
}

// "Register fragments for wgmma.mma_async.m64nNk16", accumulator D: thread, register, row, column.
constexpr int kFragments[][4] = {
    {0, 0, 0, 0},    {0, 1, 0, 1},    {0, 2, 8, 0},    {0, 3, 8, 1},    {0, 4, 0, 8},     {0, 5, 0, 9},
    {0, 6, 8, 8},    {0, 7, 8, 9},    {1, 0, 0, 2},    {1, 3, 8, 3},    {3, 1, 0, 7},     {3, 7, 8, 15},
    {4, 0, 1, 0},    {31, 0, 7, 6},   {31, 3, 15, 7},  {32, 0, 16, 0},  {63, 3, 31, 7},   {64, 2, 40, 0},
    {96, 0, 48, 0},  {127, 3, 63, 7}, {127, 1, 55, 7}, {0, 124, 0, 248}, {127, 127, 63, 255}};

void check_fragments() {
  int bad = 0;
  for (const auto& [thread, i, row, column] : kFragments) {
    bad += fragment_row(thread, i) != row || fragment_column(thread, i) != column;
  }
  report("ptx fragments", bad);
}

// "Matrix descriptor format": bits 0–13 address, 16–29 leading and 32–45 stride byte offset, each divided by 16, 49–51
// base offset, 62–63 swizzle (1: 128 bytes).
void check_descriptor() {
  const auto field = [](uint64_t d, int bit, int width) { return static_cast<int>(d >> bit & ((1u << width) - 1)); };
  int bad = 0;
  for (const uint32_t address : {0u, 1024u, 0x8000u, 0x38400u}) {
    const uint64_t k = k_major_descriptor(address), mn = mn_major_descriptor(address, 64);
    for (const uint64_t d : {k, mn}) {
      bad += field(d, 0, 14) != static_cast<int>(address >> 4) || field(d, 49, 3) != 0 || field(d, 62, 2) != 1;
      bad += field(d, 14, 2) != 0 || field(d, 30, 2) != 0 || field(d, 46, 3) != 0 || field(d, 52, 10) != 0;
      bad += field(d, 32, 14) * 16 != 1024;
    }
    bad += field(mn, 16, 14) * 16 != 8192;
  }
  report("ptx descriptor", bad);
}

#if __has_include(<cute/tensor.hpp>)
// ---- CuTe

template <int N>
void check_cute_fragments(const char* name) {
  int bad = 0;
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < N / 2; ++i) {
      // column-major: row + 64 column
      bad += cute::SM90::GMMA::CLayout_64xN<N>{}(t, i) != fragment_row(t, i) + 64 * fragment_column(t, i);
    }
  }
  report(name, bad);
}

template <cute::SM90::GMMA::Major kMajor, class Layout>
uint64_t cute_descriptor(Layout layout) {
  using namespace cute;
  const auto tile = make_tensor(make_smem_ptr(static_cast<uint16_t*>(nullptr)), layout);
  // the first step of 16 reduction elements
  const auto step = local_tile(tile, make_shape(size<0>(tile), Int<16>{}), make_coord(0, 0));
  GmmaDescriptor descriptor = SM90::GMMA::make_gmma_desc<kMajor>(step);
  // a host has no shared addresses
  return uint64_t{descriptor} & ~uint64_t{0x3fff};
}

// How far a descriptor moves for the next 16 reduction elements: the offset before the swizzle, in units of 16 bytes.
template <class Layout>
uint64_t cute_step(Layout layout) {
  return static_cast<uint64_t>(layout.layout_b()(0, 16)) * 2 / 16;
}

void check_cute_k_major() {
  using namespace cute;
  const auto layout = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<uint16_t>{}, make_shape(Int<128>{}, Int<64>{}));
  const auto place = as_position_independent_swizzle_layout(layout);
  int bad = 0;
  for (int row = 0; row < 128; ++row) {
    for (int k = 0; k < 64; ++k) bad += static_cast<uint32_t>(place(row, k)) * 2 != box_offset(row, k);
  }
  report("cute K-major tile", bad);
  report("cute K-major step", cute_step(layout) != kStepKMajor);
  report("cute K-major descriptor", cute_descriptor<SM90::GMMA::Major::K>(layout) != k_major_descriptor(0));
}

template <int N>
void check_cute_mn_major(const char* tile, const char* step, const char* descriptor) {
  using namespace cute;
  // atoms of 64 columns by 8 reduction elements, those of one box (64 reduction elements) first
  const auto layout = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<uint16_t>{}, make_shape(Int<N>{}, Int<64>{}),
                                    Step<_2, _1>{});
  const auto place = as_position_independent_swizzle_layout(layout);
  int bad = 0;
  for (int n = 0; n < N; ++n) {
    for (int k = 0; k < 64; ++k) {
      bad += static_cast<uint32_t>(place(n, k)) * 2 != static_cast<uint32_t>(n / 64 * 8192) + box_offset(k, n % 64);
    }
  }
  report(tile, bad);
  report(step, cute_step(layout) != kStepMNMajor);
  // of 64 columns there is no next box: the leading offset is not used
  const uint64_t used = N == 64 ? ~(uint64_t{0x3fff} << 16) : ~uint64_t{0};
  report(descriptor, (cute_descriptor<SM90::GMMA::Major::MN>(layout) & used) != (mn_major_descriptor(0, 64) & used));
}

void check_cute() {
  check_cute_fragments<16>("cute fragments n16");
  check_cute_fragments<32>("cute fragments n32");
  check_cute_fragments<64>("cute fragments n64");
  check_cute_fragments<128>("cute fragments n128");
  check_cute_fragments<256>("cute fragments n256");
  check_cute_k_major();
  check_cute_mn_major<64>("cute MN-major tile n64", "cute MN-major step n64", "cute MN-major descriptor n64");
  check_cute_mn_major<128>("cute MN-major tile n128", "cute MN-major step n128", "cute MN-major descriptor n128");
  check_cute_mn_major<256>("cute MN-major tile n256", "cute MN-major step n256", "cute MN-major descriptor n256");
}
#else
void check_cute() {}
#endif

}  // namespace

int main() {
  check_swizzle();
  check_fragments();
  check_descriptor();
  check_cute();
  return total == 0 ? 0 : 1;
}

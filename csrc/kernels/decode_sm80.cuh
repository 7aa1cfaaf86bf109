// Quantized weights as dense ones: 4-bit codes (NF4, FP4) and e4m3, bit for bit as their libraries decode them.
//
//   codebook   out[i] = code[q[i]] · absmax[i / block_size], absmax itself quantized where nested
//   fp8        out = data · scale, one scale a block of rows and columns
//
// Shapes and types as in `DecodeCodebook` and `DecodeFp8` of api_decode.hpp. Nothing is fused; nothing is saved.
//
// Bound by memory. Bytes a value, bf16 out: codebook 1/2 + 4/64 + 2 (block size 64), nested 1/2 + 1/64 + 2, fp8 1 + 2.
// Model, at the 4.3 TB/s of an H200: 4096 x 14336 takes 35.0 µs, nested 34.4 µs, fp8 41.0 µs. Behind that (model): a
// code is one word of shared memory, 8 µs of what the SMs can read, and eight instructions a value (SASS of sm_90) are
// 16 µs of their issue.
//
// A thread loads a chunk of 16 bytes, 32 or 16 values. Stored by that thread it would be pieces of 16 bytes 64 or 32
// apart, half a sector each; so threads exchange packed pieces first, four or two threads at a time, and each store of
// them is contiguous. Packed data is read once and leaves the caches first; what is written stays for the product.
#pragma once

#include <lorafuse/api_decode.hpp>
#include <lorafuse/divisor.cuh>
#include <lorafuse/ptx/barrier.cuh>
#include <lorafuse/ptx/convert.cuh>
#include <lorafuse/ptx/decode.cuh>
#include <lorafuse/ptx/memory.cuh>

namespace lorafuse::decode {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// of an SM: 1536 threads, with 42 registers each; sm_80 holds 2048 and sm_86, sm_89 and sm_120 hold 1536
constexpr int kBlocks = 6;
// 16-bit values of a store, and what threads exchange the codes of
constexpr int kPiece = 8;

// `chunks` whole chunks, then elements one by one up to `count`.
struct Extent {
  int64_t count, chunks;
};

LF_DEVICE float rounded_to(Type type, float value) {
  if (type == Type::BF16) return ptx::to_float(ptx::from_float<BF16>(value));
  if (type == Type::FP16) return ptx::to_float(ptx::from_float<FP16>(value));
  return value;
}

struct Codebook {
  struct Parameters : DecodeCodebook {
    Extent extent;
    // log2 of the block size
    int shift;
  };
  static constexpr int kValues = 32, kPieces = kValues / kPiece;
  static constexpr int kTableBytes = 16 * 32 * 4;

  // The codes once for each lane, in a bank of its own; nested codes behind them.
  static constexpr int shared_bytes(const Parameters& p) { return kTableBytes + (p.nested_code ? 256 * 4 : 0); }

  const Parameters& p;
  const uint8_t* tables;
  int lane_bytes;

  LF_DEVICE Codebook(const Parameters& parameters, uint8_t* shared) : p(parameters), tables(shared) {
    const int thread = static_cast<int>(threadIdx.x);
    lane_bytes = thread % 32 * 4;
    LF_UNROLL
    for (int i = thread; i < 16 * 32; i += kThreads) {
      ptx::store_shared(shared + i * 4, ptx::load_global(p.code + i / 32));
    }
    if (p.nested_code) {
      ptx::store_shared(shared + kTableBytes + thread * 4, ptx::load_global(p.nested_code + thread));
    }
    ptx::block_sync();
  }

  LF_DEVICE float code(uint32_t q) const { return ptx::load_shared<float>(tables + (q * 128 + lane_bytes)); }
  LF_DEVICE float block_scale(int64_t block) const {
    if (!p.nested_code) return ptx::load_global(static_cast<const float*>(p.absmax) + block);
    const int q = ptx::load_global(static_cast<const uint8_t*>(p.absmax) + block);
    const float nested = ptx::load_shared<float>(tables + kTableBytes + q * 4);
    return ptx::multiply_rounded(nested, ptx::load_global(p.nested_absmax + block / 256)) +
           ptx::load_global(p.nested_offset);
  }
  LF_DEVICE float chunk_scale(uint32_t chunk) const {
    return block_scale((p.first / kValues + chunk) >> (p.shift - 5));
  }

  LF_DEVICE void decode(float (&values)[kPiece], const uint32_t (&piece)[1], float scale) const {
    LF_UNROLL
    for (int i = 0; i < kPiece; ++i) values[i] = code(piece[0] >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15) * scale;
  }
  LF_DEVICE const uint8_t* data() const { return static_cast<const uint8_t*>(p.data) + p.first / 2; }
  LF_DEVICE float element(int64_t index) const {
    const int64_t i = p.first + index;
    const uint32_t both = ptx::load_global(static_cast<const uint8_t*>(p.data) + i / 2);
    return code(i % 2 ? both & 15 : both >> 4) * block_scale(i >> p.shift);
  }
};

struct Fp8 {
  struct Parameters : DecodeFp8 {
    Extent extent;
    // chunks of a row and of a block's columns
    Divisor row_chunks, block_chunks, rows, rows_of_block;
    int64_t scale_rows, scale_columns;
  };
  static constexpr int kValues = 16, kPieces = kValues / kPiece;
  static constexpr int shared_bytes(const Parameters&) { return 0; }

  const Parameters& p;

  LF_DEVICE Fp8(const Parameters& parameters, uint8_t*) : p(parameters) {}

  // Exponent and mantissa of e4m3 in those of a bf16, 120 powers of two too small: exact for subnormal numbers too.
  LF_DEVICE float value(uint32_t byte) const {
    const uint32_t magnitude = byte & 0x7f;
    const float found = ptx::unpack<BF16>((byte & 0x80) << 8 | magnitude << 4) * 0x1p120f;
    return magnitude == 0x7f ? ptx::unpack<BF16>(0x7fff) : found;
  }
  LF_DEVICE float scale_at(int64_t group, int64_t block_row, int64_t block_column) const {
    const int64_t i = (group * p.scale_rows + block_row) * p.scale_columns + block_column;
    float scale;
    if (p.scale_type == Type::FP32) {
      scale = ptx::load_global(static_cast<const float*>(p.scale) + i);
    } else if (p.scale_type == Type::BF16) {
      scale = ptx::to_float(ptx::load_global(static_cast<const BF16*>(p.scale) + i));
    } else {
      // 2^(byte - 127): 2^-127 is subnormal, 255 is NaN
      const uint32_t byte = ptx::load_global(static_cast<const uint8_t*>(p.scale) + i);
      scale = ptx::unpack<BF16>(byte == 0 ? 0x40 : byte == 255 ? 0x7fff : byte << 7);
    }
    return rounded_to(p.rounded_scale, scale);
  }
  LF_DEVICE float chunk_scale(uint32_t chunk) const {
    const uint32_t row = p.row_chunks.quotient(chunk), column = chunk - row * p.row_chunks.divisor;
    const uint32_t group = p.rows.quotient(row), row_of_group = row - group * p.rows.divisor;
    return scale_at(group, p.rows_of_block.quotient(row_of_group), p.block_chunks.quotient(column));
  }

  LF_DEVICE void decode(float (&values)[kPiece], const uint32_t (&piece)[2], float scale) const {
    LF_UNROLL
    for (int i = 0; i < kPiece; ++i) values[i] = value(piece[i / 4] >> (i % 4 * 8) & 0xff) * scale;
  }
  LF_DEVICE const uint8_t* data() const { return static_cast<const uint8_t*>(p.data); }
  LF_DEVICE float element(int64_t i) const {
    const int64_t row = i / p.K, group = row / p.N;
    const float scale = scale_at(group, (row - group * p.N) / p.block_rows, (i - row * p.K) / p.block_columns);
    return value(ptx::load_global(data() + i)) * scale;
  }
};

// Thread i of `Pieces` ends with piece i of the chunks of all of them, in the order of the threads.
template <int PIECES, int WORDS>
LF_DEVICE void exchange(uint32_t (&pieces)[PIECES][WORDS], int lane) {
  LF_UNROLL
  for (int step = 1; step < PIECES; step *= 2) {
    const bool upper = lane & step;
    LF_UNROLL
    for (int i = 0; i < PIECES * WORDS / 2; ++i) {
      const int w = i % WORDS, j = i / WORDS, low = j / step * 2 * step + j % step;
      uint32_t &first = pieces[low][w], &second = pieces[low + step][w];
      const uint32_t received = ptx::shuffle_xor(upper ? first : second, step);
      upper ? first = received : second = received;
    }
  }
}

template <class T>
LF_DEVICE void store_piece(T* out, const float (&values)[kPiece]) {
  uint32_t words[4];
  LF_UNROLL
  for (int i = 0; i < 4; ++i) words[i] = ptx::pack<T>(values[2 * i], values[2 * i + 1]);
  ptx::store_words(out, words);
}
LF_DEVICE void store_piece(float* out, const float (&values)[kPiece]) {
  ptx::store_words(out, {values[0], values[1], values[2], values[3]});
  ptx::store_words(out + 4, {values[4], values[5], values[6], values[7]});
}

template <class Codec, class T>
LF_KERNEL_SHARED(kThreads, kBlocks) decode_kernel(const typename Codec::Parameters p) {
  LF_DYNAMIC_SHARED(shared);
  constexpr int kPieces = Codec::kPieces;
  const Codec codec(p, shared);
  T* const out = static_cast<T*>(p.out);
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  const int lane = static_cast<int>(threadIdx.x) % 32, piece = lane % kPieces;

  LF_NO_UNROLL
  for (int64_t base = thread - lane; base < p.extent.chunks; base += threads) {
    uint32_t pieces[kPieces][4 / kPieces] = {};
    float scale = 0.0f;
    if (base + lane < p.extent.chunks) {
      uint32_t words[4];
      ptx::load_words_once(words, codec.data() + (base + lane) * 16);
      LF_UNROLL
      for (int i = 0; i < 4; ++i) pieces[i * kPieces / 4][i % (4 / kPieces)] = words[i];
      scale = codec.chunk_scale(static_cast<uint32_t>(base + lane));
    }
    exchange(pieces, lane);
    LF_UNROLL
    for (int i = 0; i < kPieces; ++i) {
      const int owner = lane - piece + i;
      const float scale_of_owner = ptx::shuffle(scale, owner);
      float values[kPiece];
      codec.decode(values, pieces[i], scale_of_owner);
      if (p.rounded != Type::FP32) {
        LF_UNROLL
        for (int j = 0; j < kPiece; ++j) values[j] = rounded_to(p.rounded, values[j]);
      }
      if (base + owner < p.extent.chunks) store_piece(out + ((base + owner) * kPieces + piece) * kPiece, values);
    }
  }
  LF_NO_UNROLL
  for (int64_t i = p.extent.chunks * Codec::kValues + thread; i < p.extent.count; i += threads) {
    ptx::store_global(out + i, ptx::from_float<T>(rounded_to(p.rounded, codec.element(i))));
  }
}

}  // namespace lorafuse::decode

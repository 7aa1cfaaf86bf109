// Host side of the decoding of quantized weights: checks, which part is vectors, launches.
#include <lorafuse/ptx/launch.cuh>

#include "checks.hpp"
#include "decode_sm80.cuh"

namespace lorafuse {
namespace {

using namespace decode;

void check_type(const char* name, Type type) {
  require(type == Type::BF16 || type == Type::FP16 || type == Type::FP32, name, " ", static_cast<int>(type),
          " is none of BF16, FP16 and FP32");
}
void check_given(const char* name, const void* given) { require(given != nullptr, name, " is null"); }

// What a launch stores anyway is not rounded twice.
template <class P>
void check_out(P& p) {
  check_address("out", p.out, 16);
  check_type("type", p.type);
  check_type("rounded", p.rounded);
  if (p.rounded == p.type) p.rounded = Type::FP32;
}

Extent extent_of(int64_t first, int64_t count, int values, bool chunked) {
  require((first + count) / values < int64_t{1} << 31, first, " + ", count, " values are more than ", values,
          " times 2^31");
  return {count, chunked ? count / values : 0};
}

template <class Codec>
void launch_decode(const typename Codec::Parameters& p, void* stream) {
  const int64_t items = p.extent.chunks > 0 ? p.extent.chunks : p.extent.count;
  const int64_t enough = ceil_div<int64_t>(items, kThreads), resident = int64_t{multiprocessors()} * kBlocks;
  const LaunchConfig config{static_cast<int>(enough < resident ? enough : resident), kThreads, Codec::shared_bytes(p)};
  const auto launch_type = [&]<class T>(T) { launch(decode_kernel<Codec, T>, config, static_cast<Stream>(stream), p); };
  p.type == Type::BF16 ? launch_type(BF16{}) : p.type == Type::FP16 ? launch_type(FP16{}) : launch_type(float{});
}

}  // namespace

void decode_codebook(const DecodeCodebook& given, void* stream) {
  Codebook::Parameters p{given};
  require(p.count >= 0 && p.first >= 0, "count ", p.count, " or first ", p.first, " is negative");
  const int size = p.block_size;
  require(size >= 32 && size <= 1 << 30 && (size & (size - 1)) == 0, "block size ", size,
          " is not a power of two from 32 on");
  check_out(p);
  check_address("data", p.data, 16);
  check_given("code", p.code);
  check_given("absmax", p.absmax);
  const bool nested = p.nested_code != nullptr;
  require(nested == (p.nested_absmax != nullptr) && nested == (p.nested_offset != nullptr),
          "nested_code, nested_absmax and nested_offset are given together or not at all");
  while (1 << p.shift < size) ++p.shift;
  // matrices of a stack that begin within a chunk are decoded value by value
  p.extent = extent_of(p.first, p.count, Codebook::kValues, p.first % Codebook::kValues == 0);
  if (p.count > 0) launch_decode<Codebook>(p, stream);
}

void decode_fp8(const DecodeFp8& given, void* stream) {
  Fp8::Parameters p{given};
  check_size("G", p.G);
  check_size("N", p.N);
  check_size("K", p.K);
  require(p.block_rows >= 1 && p.block_columns >= 1, "blocks of ", p.block_rows, " rows and ", p.block_columns,
          " columns are empty");
  check_out(p);
  check_address("data", p.data, 16);
  check_given("scale", p.scale);
  require(p.scale_type == Type::FP32 || p.scale_type == Type::BF16 || p.scale_type == kE8M0, "scale_type ",
          static_cast<int>(p.scale_type), " is none of FP32, BF16 and E8M0");
  check_type("rounded_scale", p.rounded_scale);
  if (p.G == 0 || p.N == 0 || p.K == 0) return;
  p.block_rows = p.block_rows < p.N ? p.block_rows : p.N;
  p.block_columns = p.block_columns < p.K ? p.block_columns : p.K;
  p.scale_rows = ceil_div(p.N, p.block_rows);
  p.scale_columns = ceil_div(p.K, p.block_columns);
  // a chunk has one scale; K that is no multiple of 16, which no library stores, is decoded value by value
  const int64_t size = Fp8::kValues;
  p.extent = extent_of(0, p.G * p.N * p.K, Fp8::kValues, p.K % size == 0 && p.block_columns % size == 0);
  if (p.extent.chunks > 0) {
    p.row_chunks = Divisor::of(p.K / size);
    p.block_chunks = Divisor::of(p.block_columns / size);
    p.rows = Divisor::of(p.N);
    p.rows_of_block = Divisor::of(p.block_rows);
  }
  launch_decode<Fp8>(p, stream);
}

}  // namespace lorafuse

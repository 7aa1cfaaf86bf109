// An adapter as the products take it: out = scale · in, or its transpose, rounded to T, zeros up to the stride.
//
// Shapes: in and out as in `Round` of api.hpp. Eight columns of out a thread. Bytes: one read and one write. A launch of
// its own costs more than that, so where another launch comes before the product, blocks of that one do it.
#pragma once

#include "skinny_sm80.cuh"

#include <lorafuse/api.hpp>

namespace lorafuse::skinny {

// Threads that an adapter takes; 0 of none.
LF_HOST_DEVICE int64_t round_chunks(const Round& p) { return p.out ? p.rows * (p.stride_out / 8) : 0; }

// Transposed, neighbouring threads have neighbouring rows of out, which are neighbours in a row of in.
template <class T, class In>
LF_DEVICE void round_chunk_from(const Round& p, int64_t i) {
  const int64_t chunks = p.stride_out / 8;
  const int64_t row = p.transposed ? i % p.rows : i / chunks, column = (p.transposed ? i / p.rows : i % chunks) * 8;
  const int64_t step = p.transposed ? p.stride_in : 1;
  const In* in = static_cast<const In*>(p.in) + row * (p.transposed ? 1 : p.stride_in) + column * step;
  float values[8];
  LF_UNROLL
  for (int j = 0; j < 8; ++j) {
    values[j] = column + j < p.columns ? p.scale * ptx::to_float(ptx::load_global(in + j * step)) : 0.0f;
  }
  Chunk chunk;
  LF_UNROLL
  for (int j = 0; j < 4; ++j) chunk.words[j] = ptx::pack<T>(values[2 * j], values[2 * j + 1]);
  ptx::store_global(reinterpret_cast<Chunk*>(static_cast<T*>(p.out) + row * p.stride_out + column), chunk);
}

template <class T>
LF_DEVICE void round_chunk(const Round& p, int64_t i) {
  if (i >= round_chunks(p)) return;
  p.in_type == Type::FP32 ? round_chunk_from<T, float>(p, i) : round_chunk_from<T, T>(p, i);
}

template <class T>
LF_KERNEL_SHARED(kThreads, 4) round_kernel(const Round p) {
  round_chunk<T>(p, static_cast<int64_t>(blockIdx.x) * kThreads + static_cast<int64_t>(threadIdx.x));
}

}  // namespace lorafuse::skinny

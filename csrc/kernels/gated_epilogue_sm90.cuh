// From accumulators of gate and up, or of dh, to global memory: the activation or its backward, in shared memory.
//
// A warpgroup's boxes of gate, of up and of dh lie alike, so that the same offset is the same element in all of them. A
// thread computes pieces of 16 bytes there, in a loop that holds every activation once, where one over the fragments of
// the accumulators would hold each 64 times. What it reads is rounded: forward and backward compute from the same
// numbers, and dh is rounded as autograd's would be.
#pragma once

#include "activation.cuh"
#include "epilogue_sm90.cuh"

namespace lorafuse::sm90 {

struct alignas(16) Piece {
  uint32_t words[4];
};
constexpr int kPieceBytes = sizeof(Piece);

// h over up, `bytes` of each.
template <class T>
LF_DEVICE void activate_boxes(Activation activation, const uint8_t* gates, uint8_t* ups, int bytes, int thread) {
  LF_NO_UNROLL
  for (int i = thread * kPieceBytes; i < bytes; i += 128 * kPieceBytes) {
    const Piece gate = ptx::load_shared<Piece>(gates + i), up = ptx::load_shared<Piece>(ups + i);
    Piece h;
    choose_activation(activation, [&](auto known) {
      LF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const auto of_half = [&](int bits) {
          return activate<known>(ptx::unpack<T>(gate.words[j] >> bits), ptx::unpack<T>(up.words[j] >> bits)).h;
        };
        h.words[j] = ptx::pack<T>(of_half(0), of_half(16));
      }
    });
    ptx::store_shared(ups + i, h);
  }
}

// Rows of a dense layer: dh is the gradient of h.
struct DenseRows {
  LF_DEVICE float factor(int) const { return 1.0f; }
  LF_DEVICE void add(int, float) const {}
};

// Of a box each: h over dh, and the gradients of gate and up over those, for dh times rows.factor(r) in row r. rows.add
// gets the part of a row's ⟨dh, h⟩ that a thread has: eight neighbours have a row of a box.
template <class T, class Rows>
LF_DEVICE void activate_backward(Activation activation, uint8_t* dhs, uint8_t* gates, uint8_t* ups, Rows& rows,
                                 int thread) {
  LF_NO_UNROLL
  for (int i = thread * kPieceBytes; i < kBoxBytes; i += 128 * kPieceBytes) {
    Piece dh = ptx::load_shared<Piece>(dhs + i), gate = ptx::load_shared<Piece>(gates + i);
    Piece up = ptx::load_shared<Piece>(ups + i);
    const float factor = rows.factor(i / kBoxRowBytes);
    float product = 0.0f;
    choose_activation(activation, [&](auto known) {
      LF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const auto of_half = [&](int bits) {
          return activate<known>(ptx::unpack<T>(gate.words[j] >> bits), ptx::unpack<T>(up.words[j] >> bits));
        };
        float d_low = ptx::unpack<T>(dh.words[j]), d_high = ptx::unpack<T>(dh.words[j] >> 16);
        const Gated low = of_half(0), high = of_half(16);
        product += d_low * low.h + d_high * high.h;
        d_low *= factor;
        d_high *= factor;
        dh.words[j] = ptx::pack<T>(low.h, high.h);
        gate.words[j] = ptx::pack<T>(d_low * low.of_gate, d_high * high.of_gate);
        up.words[j] = ptx::pack<T>(d_low * low.of_up, d_high * high.of_up);
      }
    });
    ptx::store_shared(dhs + i, dh);
    ptx::store_shared(gates + i, gate);
    ptx::store_shared(ups + i, up);
    rows.add(i / kBoxRowBytes, product);
  }
}

// Stores the warpgroup's 64 rows from `row` on of gate, up and h, whose columns begin with `column`. d has gate's columns
// and then as many of up; `boxes` is its part of the output tile. Up is stored where `keep_up`.
template <class T, int N_TILE>
LF_DEVICE void store_activated(const float (&d)[N_TILE / 2], const TensorMap* gate, const TensorMap* up, bool keep_up,
                               const TensorMap* h, Activation activation, uint8_t* boxes, int row, int column,
                               int consumer, int thread) {
  constexpr int kBoxes = N_TILE / 2 / kBoxElements;
  uint8_t* ups = boxes + kBoxes * kBoxBytes;
  // the boxes may still be read for the tile before
  if (thread == 0) ptx::tma_store_wait_read<0>();
  consumer_sync(consumer);
  write_boxes<T, N_TILE>(d, boxes, thread);
  ptx::fence_proxy_async_shared();
  consumer_sync(consumer);
  if (thread == 0) {
    if (keep_up) store_boxes(up, ups, kBoxes, row, column);
    store_boxes(gate, boxes, kBoxes, row, column);
    // h will lie where up does, which has been read then
    ptx::tma_store_wait_read<1>();
  }
  consumer_sync(consumer);
  activate_boxes<T>(activation, boxes, ups, kBoxes * kBoxBytes, thread);
  ptx::fence_proxy_async_shared();
  consumer_sync(consumer);
  if (thread == 0) store_boxes(h, ups, kBoxes, row, column);
}

// The warpgroup's rows of dgate, dup and h for dh in d, 64 columns at a time. The ring's next stages hold gate and up; the
// gradients take their place, and h that of dh. store(n, dgate, dup, h), by all threads, stores the columns from n on.
template <class T, int BLOCK_M, int BLOCK_N, class Rows, class Store>
LF_DEVICE void store_gradients(const float (&d)[BLOCK_N / 2], Pipeline<BLOCK_M, BLOCK_N>& pipeline,
                               Activation activation, Rows& rows, const Store& store, int consumer, int thread) {
  static_assert(ConsumerPart<BLOCK_M, BLOCK_N>::kColumns == BLOCK_N, "a warpgroup has rows of its own");
  const int lane = thread % 32;
  uint8_t* hs = pipeline.output(consumer);
  // nothing reads them: the tile before has waited
  write_boxes<T, BLOCK_N>(d, hs, thread);
  consumer_sync(consumer);
  LF_NO_UNROLL
  for (int n = 0; n < BLOCK_N; n += kBoxElements, hs += kBoxBytes) {
    ptx::mbarrier_wait(pipeline.full(), pipeline.parity);
    uint8_t *gates = pipeline.a() + consumer * kBoxBytes, *ups = pipeline.b() + consumer * kBoxBytes;
    activate_backward<T>(activation, hs, gates, ups, rows, thread);
    ptx::fence_proxy_async_shared();
    // what was stored before has been read, and its stage is free
    if (thread == 0) ptx::tma_store_wait_read<0>();
    consumer_sync(consumer);
    if (n > 0) pipeline.release_previous(lane);
    store(n, gates, ups, hs);
    pipeline.advance();
  }
  if (thread == 0) ptx::tma_store_wait_read<0>();
  consumer_sync(consumer);
  pipeline.release_previous(lane);
}

}  // namespace lorafuse::sm90

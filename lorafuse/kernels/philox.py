"""The dropout mask in registers: the Philox 4x32-10 words that `lorafuse.philox` defines, bit for bit.

Element `(m, k)` of a matrix of K columns has the index `i = m * K + k` and takes word `i % 4` of counter `i // 4`.
Where K is a multiple of 4, four neighbours of a row share one counter, so that a tile costs a quarter of the rounds.
"""

import triton
import triton.language as tl

__all__ = ["keep_tile"]


@triton.jit
def _words(seed, group):
    lo = (group & 0xFFFFFFFF).to(tl.uint32)
    hi = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(lo)
    return tl.philox(seed, lo, hi, zero, zero)


@triton.jit
def keep_tile(p_seed, drop_below, o_m, i_k, K, BLOCK_K: tl.constexpr, GROUPED: tl.constexpr):
    """Which elements of the rows `o_m` and the columns `i_k … i_k + BLOCK_K` survive: `[len(o_m), BLOCK_K]`, bool.

    `drop_below` is floor(p·2³²) − 1 as the bits of an int32. GROUPED needs K % 4 == 0 and i_k % 4 == 0.
    """
    seed = tl.load(p_seed)
    first = o_m.to(tl.int64)[:, None] * K + i_k
    if GROUPED:
        w0, w1, w2, w3 = _words(seed, first // 4 + tl.arange(0, BLOCK_K // 4)[None, :])
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(o_m.shape[0], BLOCK_K)
    else:
        index = first + tl.arange(0, BLOCK_K)[None, :]
        w0, w1, w2, w3 = _words(seed, index // 4)
        lane = index % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word > drop_below.to(tl.uint32, bitcast=True)

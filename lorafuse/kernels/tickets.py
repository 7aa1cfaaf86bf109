"""The main loop of `matmul` with tiles by ticket: a program that is free takes the next tile, whichever that is.

Formula, shapes and cost are those of `lorafuse.kernels.matmul`, whose tiles, products and stores these are; without an
epilogue. There tile t belongs to program t % programs. Where another kernel holds SMs, as a collective of a sharded
model does, the programs that find none start when others have ended and then walk their whole share: the launch takes
nearly twice as long. Here programs draw the tiles in their order, the next one before the epilogue of the last, so that
those that run share all of them (`bench/schedule.py` simulates both; nothing was measured).

Results do not depend on who computes a tile: they are those of `matmul`, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.kernels.common import (
    drop_below,
    grouped,
    launch_with_scratch,
    options,
    oriented,
    precision,
    rank_steps,
    tile_of,
)
from lorafuse.kernels.matmul import fits_descriptor
from lorafuse.kernels.product import base_products, low_rank_product, store_tile, weight_descriptor
from lorafuse.kernels.rows import Tiles, tile_count, tile_rows
from lorafuse.plan import KernelConfig

__all__ = ["matmul"]


@triton.jit(do_not_specialize=["drop_below"])
def _ticket_matmul_kernel(
    p_ticket,
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_b,
    p_y,
    p_source,
    p_tiles,
    p_seed,
    M,
    N,
    K,
    R,
    G,
    stride_xm,
    stride_w,
    stride_b,
    scale,
    drop_below,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEPS: tl.constexpr,
    GROUP_M: tl.constexpr,
    GROUPED: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr,
    TMA_X: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS_LAST: tl.constexpr,
):
    """`p_ticket` counts the tiles that were taken, from 0."""
    tiles_m = tile_count(p_tiles, M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    d_x = None
    if TMA_X:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    d_w = (weight_descriptor(p_w, G, N, K, stride_w, ROWS, False, BLOCK_N, BLOCK_K),)
    d_y = None
    if TMA_X and p_tiles is None:
        d_y = tl.make_tensor_descriptor(p_y, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])

    t = tl.atomic_add(p_ticket, 1, sem="relaxed")
    while t < tiles_m * tiles_n:
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
        o_m = row + tl.arange(0, BLOCK_M)
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = o_n < N
        group_w = group.to(tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        (acc,) = base_products(
            (acc,), p_x, d_x, (p_w,), d_w, p_source, group, row, end, o_m, o_n, inside, i_n * BLOCK_N, K, stride_xm,
            (stride_w,), BLOCK_N, BLOCK_K, PRECISION, ROWS, False,
        )  # fmt: skip
        # hidden by what is left of the tile. At its start this would take the first tiles of programs that begin later
        ahead = tl.atomic_add(p_ticket, 1, sem="relaxed")
        rows = o_m < end
        if p_xa is not None:
            acc = low_rank_product(
                acc, p_xa, p_b + group_w * stride_b[0], p_seed, drop_below, scale, o_m, o_n, rows, inside,
                i_n, N, R, R, stride_b[1], BLOCK_R, RANK_STEPS, RANKS_LAST, GROUPED, LOW_PRECISION,
            )  # fmt: skip
        if p_bias is not None:
            acc += tl.load(p_bias + group_w * N + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]
        store_tile(acc, d_y, p_y, row, i_n * BLOCK_N, o_m, o_n, rows, inside, N)
        t = ahead


def matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, xa: Tensor | None, b: Tensor | None, scale: float | None, programs: int,
    config: KernelConfig, *, tiles: Tiles | None = None, source: Tensor | None = None, seed: Tensor | None = None,
    p: float = 0.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`lorafuse.kernels.matmul.matmul` in a "tma" configuration, and a launch before it that zeroes the ticket."""
    assert config.form == "tma", config
    c, M, (N, K) = config, x.shape[0] if tiles is None else tiles.rows, w.shape[-2:]
    y = x.new_empty((M, N)) if out is None else out
    table = None if tiles is None else tiles.of(c.block_m)
    # the most tiles that there can be
    tiles_m = triton.cdiv(M, c.block_m) if table is None else table.shape[0] - 1
    count = tiles_m * triton.cdiv(N, c.block_n)
    stride_b, ranks_last = (0, 0), True
    if b is not None:
        b, ranks_last, stride_b = oriented(b)
    ticket = torch.zeros(1, dtype=torch.int32, device=x.device)

    def launch() -> None:
        _ticket_matmul_kernel[(min(programs, count),)](
            ticket,
            x,
            w,
            bias,
            xa,
            b,
            y,
            source,
            table,
            seed,
            M,
            N,
            K,
            0 if xa is None else xa.shape[1],
            None if tiles is None else tiles.groups,
            x.stride(0),
            w.stride() if w.dim() == 3 else (max(w.stride()), *w.stride()),
            stride_b,
            scale,
            drop_below(p),
            BLOCK_M=c.block_m,
            BLOCK_N=c.block_n,
            BLOCK_K=c.block_k,
            BLOCK_R=c.block_r,
            RANK_STEPS=0 if xa is None else rank_steps(xa.shape[1], c),
            GROUP_M=c.group_m,
            GROUPED=grouped(N),
            PRECISION=precision(x.dtype),
            LOW_PRECISION=precision(x.dtype, None if xa is None else xa.dtype),
            TMA_X=source is None and fits_descriptor(x),
            ROWS="nk" if w.stride(-1) == 1 else "kn",
            RANKS_LAST=ranks_last,
            **options(c),
        )

    launch_with_scratch(launch, x.device)
    return y

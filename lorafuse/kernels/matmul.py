"""The main loop of every LoRA layer: dense and ragged rows, forward and input gradient, one kernel.

    y[s] = x[s] wᵀ[g] + bias[g] + drop(xa[s] (scale · b[g])ᵀ)        g the group of row s

Shapes: x [rows, K] with any row stride, row s of it the s-th or `source[s]`; w [G, N, K] with any strides, bias [G, N],
xa [M, R] contiguous, b [G, N, R] with any strides, y [M, N]. Dense rows are one group: w [N, K], b [N, R], no tiles.
Ragged rows are in the order of their groups, in tiles of `rows`; rows of no group are not written.
The input gradient is the same product: `dx = dy w + drop(dyb a)` reads w and a transposed, by their strides, and draws
the mask again that dropped x.

Fused: the low-rank product is accumulated in the fp32 accumulator of the base product, as R more columns of K; then
bias and an epilogue (`epilogues`) in the same registers. y is written once and never read. b may be fp32 and is rounded
to xa's dtype after its scale. An fp32 xa over 16-bit operands, whose range fp16 lacks, is multiplied in tf32.
Nothing is saved for backward here.

Loads: "tma" configurations read w, and x where its rows follow each other, through tensor descriptors, and as many
programs as there are SMs walk the tiles. Rows that are gathered, and everything in "pointer" configurations, are read
through pointers.

Cost: 2MN(K + R) FLOPs, one pass over x, w and y, N / BLOCK_N reads of xa.
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
from lorafuse.kernels.epilogues import activate, activate_backward
from lorafuse.kernels.product import base_products, low_rank_product, store_tile, weight_descriptor
from lorafuse.kernels.rows import Tiles, tile_count, tile_rows
from lorafuse.plan import KernelConfig

__all__ = ["activated", "activation_backward", "fits_descriptor", "gated_backward", "matmul", "parts_of"]

# accumulators of a thread that an activation takes at a time: u, h and the slopes of more do not fit beside those that
# wait (Triton 3.6, 2026-11-25)
_PART = 16


@triton.jit(do_not_specialize=["drop_below"])
def _lora_matmul_kernel(
    p_x,
    p_w,
    p_bias,
    p_xa,
    p_b,
    p_y,
    p_source,
    p_tiles,
    p_seed,
    operands,
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
    TMA_W: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS_LAST: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """EPILOGUE is (its name, activation, gate layout, parts) and `operands` what it reads or writes beside y.

    ROWS is "nk" where K is the contiguous dimension of w, "kn" where it is another.
    """
    # gate and up of the same columns of h are in one tile, so that x is read once and both are in one accumulator
    PAIRED: tl.constexpr = EPILOGUE[0] == "activate" and EPILOGUE[2] == "concatenated"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
    TMA_Y: tl.constexpr = TMA_X and TMA_W and p_tiles is None and EPILOGUE[0] == "store"
    limit = N // 2 if PAIRED else N
    tiles_m = tile_count(p_tiles, M, BLOCK_M)
    tiles_n = tl.cdiv(limit, COLUMNS)
    d_x = None
    if TMA_X:
        d_x = tl.make_tensor_descriptor(p_x, [M, K], [stride_xm, 1], [BLOCK_M, BLOCK_K])
    d_w = ()  # type: tuple
    if TMA_W:
        d_w = (weight_descriptor(p_w, G, N, K, stride_w, ROWS, PAIRED, BLOCK_N, BLOCK_K),)
    d_y = None
    if TMA_Y:
        d_y = tl.make_tensor_descriptor(p_y, [M, N], [N, 1], [BLOCK_M, BLOCK_N // 2])

    for t in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        i_m, i_n = tile_of(t, tiles_m, tiles_n, GROUP_M)
        group, row, end = tile_rows(p_tiles, i_m, M, BLOCK_M)
        o_m = row + tl.arange(0, BLOCK_M)
        # columns of y, and which exist; those of up are `limit` behind those of gate
        o_n = i_n * COLUMNS + tl.arange(0, BLOCK_N) % COLUMNS
        inside = o_n < limit
        if PAIRED:
            o_n += tl.arange(0, BLOCK_N) // COLUMNS * limit
        group_w = group.to(tl.int64)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        (acc,) = base_products(
            (acc,), p_x, d_x, (p_w,), d_w, p_source, group, row, end, o_m, o_n, inside, i_n * COLUMNS, K, stride_xm,
            (stride_w,), BLOCK_N, BLOCK_K, PRECISION, ROWS, PAIRED,
        )  # fmt: skip
        rows = o_m < end
        if p_xa is not None:
            acc = low_rank_product(
                acc, p_xa, p_b + group_w * stride_b[0], p_seed, drop_below, scale, o_m, o_n, rows, inside,
                i_n, N, R, R, stride_b[1], BLOCK_R, RANK_STEPS, RANKS_LAST, GROUPED, LOW_PRECISION,
            )  # fmt: skip
        if p_bias is not None:
            acc += tl.load(p_bias + group_w * N + o_n, mask=inside, other=0.0).to(tl.float32)[None, :]

        if EPILOGUE[0] == "activate":
            activate(acc, i_n * COLUMNS, o_m.to(tl.int64)[:, None], rows[:, None], p_y, operands, N, EPILOGUE)
        elif EPILOGUE[0] == "activate_backward":
            activate_backward(acc, i_n, o_m, end, p_y, operands, M, N, EPILOGUE)
        else:
            store_tile(acc, d_y, p_y, row, i_n * BLOCK_N, o_m, o_n, rows, inside, N)


def _launch(
    epilogue: tuple[str, str, str], operands: tuple, x: Tensor, w: Tensor, bias: Tensor | None,
    xa: Tensor | None, b: Tensor | None, scale: float | None, y: Tensor | tuple[Tensor, Tensor], programs: int,
    config: KernelConfig, tiles: Tiles | None, source: Tensor | None, seed: Tensor | None = None, p: float = 0.0,
) -> None:  # fmt: skip
    c, M, (N, K) = config, x.shape[0] if tiles is None else tiles.rows, w.shape[-2:]
    table = None if tiles is None else tiles.of(c.block_m)
    paired = 2 if epilogue[0] == "activate" and epilogue[2] == "concatenated" else 1
    # the most tiles that there can be
    tiles_m = triton.cdiv(M, c.block_m) if table is None else table.shape[0] - 1
    count = tiles_m * triton.cdiv(N // paired, c.block_n // paired)
    tma = c.form == "tma"
    stride_b, ranks_last = (0, 0), True
    if b is not None:
        b, ranks_last, stride_b = oriented(b)

    def launch() -> None:
        _lora_matmul_kernel[(min(programs, count) if tma else count,)](
            x,
            w,
            bias,
            xa,
            b,
            y,
            source,
            table,
            seed,
            operands,
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
            TMA_X=tma and source is None and fits_descriptor(x),
            TMA_W=tma,
            ROWS="nk" if w.stride(-1) == 1 else "kn",
            RANKS_LAST=ranks_last,
            EPILOGUE=(*epilogue, parts_of(c)),
            **options(c),
        )

    if tma:
        launch_with_scratch(launch, x.device)
    else:
        launch()


def parts_of(config: KernelConfig) -> int:
    """Parts of a tile's columns that an epilogue takes one after the other."""
    return max(1, config.block_m * config.block_n // (32 * config.warps * _PART))


def fits_descriptor(x: Tensor) -> bool:
    """Whether every row starts on a 16-byte boundary, behind the row before."""
    row = x.stride(0) * x.element_size()
    return row % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) >= x.shape[1]


def matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, xa: Tensor | None, b: Tensor | None, scale: float | None, programs: int,
    config: KernelConfig, *, tiles: Tiles | None = None, source: Tensor | None = None, seed: Tensor | None = None,
    p: float = 0.0, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`y [M, N]` in x's dtype: x wᵀ + bias + drop(xa (scale · b)ᵀ).

    x has contiguous rows; xa and bias are contiguous. Dense without `tiles`: w `[N, K]`, b `[N, R]`, and in a "tma"
    configuration 16-byte aligned rows of everything. Ragged with them: w `[G, N, K]`, b `[G, N, R]`, bias `[G, N]`, and
    rows of no group are not written; tiles of some groups write theirs of `out`, which is y then. For dx, pass w and a
    transposed. A `scale` of None is 1, without a multiplication. The mask of `seed` and `p` is over `[M, N]`, and
    nothing is rescaled. `programs` is how many run at a time, the number of SMs.
    """
    y = x.new_empty((x.shape[0] if tiles is None else tiles.rows, w.shape[-2])) if out is None else out
    _launch(("store", "", ""), (), x, w, bias, xa, b, scale, y, programs, config, tiles, source, seed, p)
    return y


def activated(
    x: Tensor, w: Tensor, bias: Tensor | None, xa: Tensor | None, b: Tensor | None, scale: float | None,
    activation: str, gate: str, programs: int, config: KernelConfig, *, tiles: Tiles, source: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`(u [S, N], h [S, I])`: u as `matmul` computes y, and its activation.

    `gate` is how the rows of w, and u, hold gate and up: "concatenated", "interleaved", or "" without a gate.
    """
    u, h = out or tuple(x.new_empty((tiles.rows, w.shape[1] // divisor)) for divisor in (1, 2 if gate else 1))
    _launch(("activate", activation, gate), (h,), x, w, bias, xa, b, scale, u, programs, config, tiles, source)
    return u, h


def activation_backward(
    g: Tensor, w: Tensor, gb: Tensor | None, a: Tensor | None, scale: float | None, u: Tensor, activation: str,
    gate: str, router_grad: bool, programs: int, config: KernelConfig, *, tiles: Tiles, source: Tensor,
    row_scale: Tensor, out: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """`(du [S, U], h [S, I], parts of ⟨dh, h⟩ [parts, S])` for dh = g wᵀ + gb (scale · a)ᵀ; du is that of
    `row_scale · dh`.

    w `[G, I, H]` and a `[G, I, R]` are those of the down projection, read transposed. h is computed from u again.
    """
    I = w.shape[1]  # noqa: E741
    if out is None:
        du, h, parts = torch.empty_like(u), u.new_empty((tiles.rows, I)), triton.cdiv(I, config.block_n)
        shares = torch.empty((parts, tiles.rows), dtype=torch.float32, device=u.device) if router_grad else None
        out = du, h, shares
    du, h, shares = out
    operands = u, h, row_scale, shares
    _launch(
        ("activate_backward", activation, gate), operands, g, w, None, gb, a, scale, du, programs, config, tiles, source
    )
    return out


def gated_backward(
    dy: Tensor, w: Tensor, dyb: Tensor | None, a: Tensor | None, scale: float | None, gate: Tensor, up: Tensor,
    activation: str, programs: int, config: KernelConfig, *, seed: Tensor | None = None, p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(dgate, dup, h)`, `[M, I]` each, for dh = dy wᵀ + drop(dyb (scale · a)ᵀ) of dense rows, which is not stored.

    w `[I, N]` and a `[I, R]` are those of the down projection, read transposed; gate and up are contiguous.
    """
    dgate, dup, h = torch.empty_like(gate), torch.empty_like(up), torch.empty_like(gate)
    operands, epilogue = ((gate, up), h, None, None), ("activate_backward", activation, "apart")
    _launch(epilogue, operands, dy, w, None, dyb, a, scale, (dgate, dup), programs, config, None, None, seed, p)
    return dgate, dup, h

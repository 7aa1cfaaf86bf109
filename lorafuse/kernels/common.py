"""What the kernel files share: tile order and rank tiles on the device, operands and launches on the host."""

import contextvars
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorafuse.plan import KernelConfig

__all__ = [
    "drop_below",
    "grouped",
    "launch_with_scratch",
    "load_rank_tile",
    "options",
    "oriented",
    "precision",
    "rank_steps",
    "split_columns",
    "store_halves",
    "tile_of",
]


@triton.jit
def tile_of(t, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column block of tile `t`: GROUP_M row blocks at a time, tiles in flight share rows and columns."""
    group = t // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = t % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def load_rank_tile(p, o_row, rows, o_r, R, scale, dtype: tl.constexpr):
    """`scale · p[o_row, o_r]` of a contiguous `[rows, R]` matrix, rounded once to `dtype`, zero outside."""
    mask = (o_row < rows)[:, None] & (o_r < R)[None, :]
    tile = tl.load(p + o_row.to(tl.int64)[:, None] * R + o_r[None, :], mask=mask, other=0.0)
    return (tile.to(tl.float32) * scale).to(dtype)


@triton.jit
def split_columns(t):
    """The left and the right half of a tile's columns."""
    HALF: tl.constexpr = t.shape[1] // 2
    left, right = tl.split(t.reshape((t.shape[0], 2, HALF)).permute((0, 2, 1)))
    return left, right


@triton.jit
def store_halves(d, row, column, acc, dtype: tl.constexpr):
    """Store a tile through a descriptor of half its width: half the shared memory for staging."""
    left, right = split_columns(acc)
    d.store([row, column], left.to(dtype))
    d.store([row, column + acc.shape[1] // 2], right.to(dtype))


def precision(dtype: torch.dtype, low: torch.dtype | None = None) -> str:
    """How `tl.dot` multiplies fp32: IEEE unless torch allows tf32. Half-precision products are exact either way.

    `low` is the dtype of xa and dyb: where that is fp32 over an fp16 `dtype`, tf32 has fp16's mantissa, fp32's range.
    """
    if low is torch.float32 and dtype is not low:
        return "tf32"
    return "tf32" if dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def oriented(b: Tensor) -> tuple[Tensor, bool, tuple[int, int]]:
    """b `[…, N, R]`, copied only where neither of its last two dimensions is contiguous; whether ranks are, and its
    strides over groups (0 without) and over the other of the two dimensions.
    """
    b = b if 1 in b.stride()[-2:] else b.contiguous()
    ranks_last = b.stride(-1) == 1
    return b, ranks_last, (b.stride(0) if b.dim() == 3 else 0, b.stride(-2 if ranks_last else -1))


def rank_steps(R: int, config: KernelConfig) -> int:
    """Rank tiles that cover `R`."""
    return triton.cdiv(R, config.block_r)


def drop_below(p: float) -> int:
    """The threshold of `lorafuse.philox` as kernels take it: floor(p·2³²) − 1, its 32 bits read as signed.

    Below p = 2⁻³², where that definition drops nothing, kernels drop one element in 2³².
    """
    bits = max(0, min(int(p * 2**32), 2**32) - 1)
    return bits - 2**32 if bits >= 2**31 else bits


def grouped(columns: int) -> bool:
    """Whether four neighbours of a row share one Philox counter."""
    return columns % 4 == 0


def options(config: KernelConfig) -> dict[str, int]:
    """Launch options of a kernel."""
    limit = {"maxnreg": config.max_registers} if config.max_registers else {}
    return {"num_warps": config.warps, "num_stages": config.stages, **limit}


def launch_with_scratch(launch: Callable[[], object], device: torch.device) -> None:
    """Run a launch whose kernel builds tensor descriptors, 128 bytes of global memory each, from torch's allocator."""

    def run() -> None:
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
        launch()

    # Triton keeps its allocator in a context variable: the caller's own stays as it was
    contextvars.copy_context().run(run)

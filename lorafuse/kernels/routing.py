"""Ragged rows: which rows a program takes, found on the device, and the sum over a token's choices.

Rows `[S, …]` are in the order of their groups (the experts of a layer, or the adapters of a batch); group g has rows
`ends[g-1] … ends[g]`. Tiles of BLOCK_M rows do not cross groups. How many there are is known on the device only, so
launches are for the most there can be, and programs without a tile return.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiles", "combine", "ragged_tiles", "source_rows"]


@triton.jit
def _ragged_tiles_kernel(p_ends, p_tiles, G, capacity, BLOCK_M, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr):
    """`tiles[t] = (group, first row, last row + 1)`; of those that do not exist group G; then `(G, how many do, 0)`."""
    o_g = tl.arange(0, BLOCK_G)
    last = tl.load(p_ends + o_g, mask=o_g < G, other=0).to(tl.int32)
    first = tl.load(p_ends + o_g - 1, mask=(o_g > 0) & (o_g < G), other=0).to(tl.int32)
    tiles = tl.where(o_g < G, tl.cdiv(last - first, BLOCK_M), 0)
    tile_end = tl.cumsum(tiles, 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    group = tl.sum(((tile_end[None, :] <= t[:, None]) & (o_g < G)[None, :]).to(tl.int32), 1)
    mine = o_g[None, :] == group[:, None]
    row = tl.sum(tl.where(mine, (first - (tile_end - tiles) * BLOCK_M)[None, :], 0), 1) + t * BLOCK_M
    end = tl.sum(tl.where(mine, last[None, :], 0), 1)
    row = tl.where(t == capacity, tl.sum(tiles, 0), row)
    tl.store(p_tiles + t * 3, group, mask=t <= capacity)
    tl.store(p_tiles + t * 3 + 1, row, mask=t <= capacity)
    tl.store(p_tiles + t * 3 + 2, end, mask=t <= capacity)


@triton.jit
def source_rows(p_source, o_m, row, end):
    """Rows of x that a tile reads; those outside are the first one's, computed and not stored."""
    o_m = tl.where(o_m < end, o_m, row)
    if p_source is not None:
        o_m = tl.load(p_source + o_m)
    return o_m.to(tl.int64)


@triton.jit
def _combine_kernel(p_y, p_place, p_ends, p_weight, p_out, H, G, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """`out[t] = Σ_j weight[t, j] · y[place[t, j]]` over the rows that belong to a group, in the order of j."""
    t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(p_ends + G - 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for j in range(CHOICES):
        row = tl.load(p_place + t * CHOICES + j)
        y = tl.load(p_y + row * H + o_h, mask=o_h < tl.where(row < rows, H, 0), other=0.0).to(tl.float32)
        if p_weight is not None:
            # that of a row of no group may be anything
            y *= tl.load(p_weight + t * CHOICES + j, mask=row < rows, other=0.0).to(tl.float32)
        acc += y
    tl.store(p_out + t * H + o_h, acc.to(p_out.dtype.element_ty), mask=o_h < H)


class Tiles:
    """The tiles of a batch of groups: a table on the device for each height of a tile, made once."""

    def __init__(self, ends: Tensor, rows: int) -> None:
        self.ends, self.rows, self.groups = ends, rows, ends.shape[0]
        self._tables: dict[int, Tensor] = {}

    def preset(self, block_m: int, table: Tensor) -> None:
        """Take a table that was made elsewhere."""
        self._tables[block_m] = table

    def of(self, block_m: int) -> Tensor:
        """The table for tiles of `block_m` rows."""
        if block_m not in self._tables:
            self._tables[block_m] = ragged_tiles(self.ends, self.rows, block_m)
        return self._tables[block_m]


def ragged_tiles(ends: Tensor, rows: int, block_m: int) -> Tensor:
    """`[capacity + 1, 3]` int32: (group, first row, last row + 1) of each tile, then how many of them exist.

    The group of those that do not is G; the last row is (G, tiles, 0).
    """
    groups = ends.shape[0]
    capacity = rows // block_m + min(groups, rows)
    tiles = torch.empty((capacity + 1, 3), dtype=torch.int32, device=ends.device)
    block_g = triton.next_power_of_2(groups)
    block_t = max(1, min(64, 16384 // block_g))
    _ragged_tiles_kernel[(triton.cdiv(capacity + 1, block_t),)](
        ends, tiles, groups, capacity, block_m, BLOCK_G=block_g, BLOCK_T=block_t, num_warps=8
    )
    return tiles


def combine(y: Tensor, order: Tensor, ends: Tensor, weight: Tensor | None, tokens: int) -> Tensor:
    """`out [T, H]`: the sum of each token's rows of y `[S, H]`, times weight `[T, k]`, contiguous, if given.

    Row s of y is choice `order[s]` of all T·k; rows of no group are not read.
    """
    S, H = y.shape
    place = torch.empty_like(order).scatter_(0, order, torch.arange(S, device=order.device))
    out = y.new_empty((tokens, H))
    block = min(1024, triton.next_power_of_2(H))
    _combine_kernel[(tokens, triton.cdiv(H, block))](
        y, place, ends, weight, out, H, ends.shape[0], CHOICES=S // tokens, BLOCK=block, num_warps=4
    )
    return out

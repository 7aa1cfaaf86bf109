"""Which rows a tile has: BLOCK_M rows of one group, found on the device.

Dense rows are those of one group. Ragged rows `[S, …]` are in the order of their groups (the experts of a layer, or the
adapters of a batch); group g has rows `ends[g-1] … ends[g]`. Tiles do not cross groups. The device alone knows how many
tiles there are: a launch covers the most there can be, and programs without a tile return.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_COMPARED", "Tiles", "ragged_tiles", "source_rows", "tile_count", "tile_rows"]


@triton.jit
def tile_count(p_tiles, M, BLOCK_M: tl.constexpr):
    """Tiles of all rows; `p_tiles` is None for dense rows."""
    if p_tiles is None:
        return tl.cdiv(M, BLOCK_M)
    else:
        return tl.load(p_tiles + 1)


@triton.jit
def tile_rows(p_tiles, i_m, M, BLOCK_M: tl.constexpr):
    """`(group, first row, last row + 1)` of tile `i_m`; the last row is that of the group, or of all dense rows."""
    if p_tiles is None:
        return tl.cast(0, tl.int32), i_m * BLOCK_M, M
    else:
        p_tile = p_tiles + (i_m + 1) * 3
        return tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2)


@triton.jit
def source_rows(p_source, o_m, row, end):
    """Rows of x that a tile reads; those outside are the first one's, computed and not stored."""
    o_m = tl.where(o_m < end, o_m, row)
    if p_source is not None:
        o_m = tl.load(p_source + o_m)
    return o_m.to(tl.int64)


@triton.jit
def _ragged_tiles_kernel(
    p_ends, p_tiles, start, G, capacity, BLOCK_M, BLOCK_G: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Tiles of the G groups from `start` on, which are numbered from 0."""
    o_g = tl.arange(0, BLOCK_G)
    p_end = p_ends + start + o_g
    last = tl.load(p_end, mask=o_g < G, other=0).to(tl.int32)
    first = tl.load(p_end - 1, mask=(start + o_g > 0) & (o_g < G), other=0).to(tl.int32)
    tiles = tl.where(o_g < G, tl.cdiv(last - first, BLOCK_M), 0)
    tile_end = tl.cumsum(tiles, 0)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T) - 1
    group = tl.sum(((tile_end[None, :] <= t[:, None]) & (o_g < G)[None, :]).to(tl.int32), 1)
    mine = o_g[None, :] == group[:, None]
    row = tl.sum(tl.where(mine, (first - (tile_end - tiles) * BLOCK_M)[None, :], 0), 1) + t * BLOCK_M
    end = tl.sum(tl.where(mine, last[None, :], 0), 1)
    # the first entry, at t = -1, counts the tiles
    p_tile = p_tiles + (t + 1) * 3
    tl.store(p_tile, tl.where(t < 0, G, group), mask=t < capacity)
    tl.store(p_tile + 1, tl.where(t < 0, tl.sum(tiles, 0), row), mask=t < capacity)
    tl.store(p_tile + 2, end, mask=t < capacity)


# groups of which one program compares all with its tiles; more are searched for (2^20 elements are the most that a
# block of Triton holds, and a program's time is linear in them)
MOST_COMPARED = 4096


class Tiles:
    """The tiles of a batch of groups, or of some of them: a table on the device for each height of a tile, made once.

    `ends` and `rows` are those of the whole batch.
    """

    def __init__(self, ends: Tensor, rows: int, part: slice | None = None) -> None:
        self.ends, self.rows, self._part = ends, rows, part or slice(0, ends.shape[0])
        self.groups = self._part.stop - self._part.start
        self._tables: dict[int, Tensor] = {}
        self._parts: dict[tuple[int, int], Tiles] = {}

    def part(self, groups: slice) -> "Tiles":
        """Those of some groups, which are numbered from 0 there."""
        if groups.stop - groups.start == self.groups:
            return self
        key = groups.start, groups.stop
        if key not in self._parts:
            self._parts[key] = Tiles(self.ends, self.rows, groups)
        return self._parts[key]

    def preset(self, block_m: int, table: Tensor) -> None:
        """Take a table that was made elsewhere."""
        self._tables[block_m] = table

    def of(self, block_m: int) -> Tensor:
        """The table for tiles of `block_m` rows."""
        if block_m not in self._tables:
            self._tables[block_m] = ragged_tiles(self.ends, self.rows, block_m, self._part)
        return self._tables[block_m]


def ragged_tiles(ends: Tensor, rows: int, block_m: int, part: slice | None = None) -> Tensor:
    """`[1 + capacity, 3]` int32: `(G, how many tiles exist, …)`, then (group, first row, last row + 1) of each tile.

    Those that do not exist have group G. The G groups are a part of those of `ends`, or all.
    """
    start, stop = (0, ends.shape[0]) if part is None else (part.start, part.stop)
    groups = stop - start
    capacity = rows // block_m + min(groups, rows)
    if groups > MOST_COMPARED:
        return _searched(ends, start, stop, capacity, block_m)
    tiles = torch.empty((1 + capacity, 3), dtype=torch.int32, device=ends.device)
    block_g = triton.next_power_of_2(groups)
    block_t = max(1, min(64, 16384 // block_g))
    _ragged_tiles_kernel[(triton.cdiv(1 + capacity, block_t),)](
        ends, tiles, start, groups, capacity, block_m, BLOCK_G=block_g, BLOCK_T=block_t, num_warps=8
    )
    return tiles


def _searched(ends: Tensor, start: int, stop: int, capacity: int, block_m: int) -> Tensor:
    """The same table by torch's search on the device."""
    last = ends[start:stop].int()
    before = ends[start - 1 : start].int() if start else last.new_zeros(1)
    first = torch.cat((before, last[:-1]))
    tiles = (last - first + block_m - 1) // block_m
    tile_end = tiles.cumsum(0, dtype=torch.int32)
    t = torch.arange(capacity, dtype=torch.int32, device=ends.device)
    group = torch.searchsorted(tile_end, t, right=True, out_int32=True)
    mine = group.clamp(max=stop - start - 1)
    row = first[mine] + (t - tile_end[mine] + tiles[mine]) * block_m
    head = torch.stack((torch.full_like(tile_end[-1], stop - start), tile_end[-1], torch.zeros_like(tile_end[-1])))
    return torch.cat((head[None], torch.stack((group, row, last[mine]), 1)))

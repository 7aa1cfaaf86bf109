"""From the choices of a router to rows in the order of their groups, in two launches.

Of choices `index [S]`, int64, among E groups: `order [S]`, the choices sorted by group, those of one group in their own
order; `token [S]`, order // choices of a token; `offsets [E]`, where each group ends. An index of E or more belongs to
no group and stays behind the others. A counting sort: the first launch counts the groups of each block of choices, the
second adds the blocks before its own and writes every choice to its place. Nothing waits for the device and no element
of the result depends on when a block runs.

Bytes: index twice, order and token once; counts, 4 (E + 2) for every 512 choices, from L2 once for each such block.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["BLOCK_S", "MOST_GROUPS", "Routing", "count", "made", "route", "scatter"]

# counters of all groups are registers of a program: 2048 of eight warps are eight each
MOST_GROUPS = 2047
# choices of a program, those that are ranked at once by comparing each with each, and blocks that are added at once
# (H200 model: 65536 choices are 128 programs, one for each SM; nothing was measured)
BLOCK_S, _BLOCK_R, _BLOCK_B = 512, 64, 16
_WARPS = 8


@triton.jit
def _group_of(p_index, o_s, S, E):
    """`(group, index)` of choices; those of no group, negative ones and those past the end have group E."""
    index = tl.load(p_index + o_s, mask=o_s < S, other=E)
    return tl.where((index < 0) | (index > E), E, index).to(tl.int32), index


@triton.jit
def _count_kernel(p_index, p_counts, S, E, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """A row `[BLOCK_E + 1]` of counts for each block: of every group, then how many choices are negative."""
    i_s = tl.program_id(0)
    group, index = _group_of(p_index, i_s * BLOCK_S + tl.arange(0, BLOCK_S), S, E)
    p_row = p_counts + i_s * (BLOCK_E + 1)
    tl.store(p_row + tl.arange(0, BLOCK_E), tl.histogram(group, BLOCK_E))
    tl.store(p_row + BLOCK_E, tl.sum(tl.where(index < 0, 1, 0), 0))


@triton.jit
def _scatter_kernel(
    p_index, p_counts, p_order, p_token, p_offsets, p_valid, S, E, blocks, choices, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Every choice of a block to its place; the first program writes offsets, and whether no choice is negative."""
    i_s = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    negative = 0
    for i_b in range(0, blocks, BLOCK_B):
        o_b = i_b + tl.arange(0, BLOCK_B)
        p_row = p_counts + o_b * (BLOCK_E + 1)
        count = tl.load(p_row[:, None] + o_e[None, :], mask=(o_b < blocks)[:, None], other=0)
        total += tl.sum(count, 0)
        before += tl.sum(tl.where((o_b < i_s)[:, None], count, 0), 0)
        negative += tl.sum(tl.load(p_row + BLOCK_E, mask=o_b < blocks, other=0), 0)
    end = tl.cumsum(total, 0)
    if i_s == 0:
        tl.store(p_offsets + o_e, end.to(tl.int64), mask=o_e < E)
        tl.store(p_valid, tl.where(negative == 0, 1, 0).to(tl.int8))
    place = end - total + before
    o_r = tl.arange(0, BLOCK_R)
    for i_r in range(0, BLOCK_S, BLOCK_R):
        o_s = i_s * BLOCK_S + i_r + o_r
        group, _ = _group_of(p_index, o_s, S, E)
        earlier = (group[None, :] == group[:, None]) & (o_r[None, :] < o_r[:, None])
        row = tl.gather(place, group, 0) + tl.sum(earlier.to(tl.int32), 1)
        tl.store(p_order + row, o_s.to(tl.int64), mask=o_s < S)
        tl.store(p_token + row, (o_s // choices).to(tl.int64), mask=o_s < S)
        place += tl.histogram(group, BLOCK_E)


@dataclass(frozen=True)
class Routing:
    """The operands of both launches; `index [S]`, S at least 1, `valid` int8 `[1]`: no index is negative."""

    index: Tensor
    groups: int
    choices: int
    counts: Tensor
    order: Tensor
    token: Tensor
    offsets: Tensor
    valid: Tensor
    block_s: int


def made(index: Tensor, groups: int, choices: int) -> Routing:
    """The memory of the results, and of the counts between the launches."""
    S, device = index.shape[0], index.device
    # few choices are one block
    block_s = max(_BLOCK_R, min(BLOCK_S, triton.next_power_of_2(S)))
    counts = torch.empty((triton.cdiv(S, block_s), _bins(groups) + 1), dtype=torch.int32, device=device)
    order, token = torch.empty((2, S), dtype=torch.int64, device=device)
    offsets = torch.empty(groups, dtype=torch.int64, device=device)
    valid = torch.empty(1, dtype=torch.int8, device=device)
    return Routing(index, groups, choices, counts, order, token, offsets, valid, block_s)


def _bins(groups: int) -> int:
    return triton.next_power_of_2(groups + 1)


def count(r: Routing) -> None:
    """The first launch."""
    sizes = {"BLOCK_S": r.block_s, "BLOCK_E": _bins(r.groups), "num_warps": _WARPS}
    _count_kernel[(r.counts.shape[0],)](r.index, r.counts, r.index.shape[0], r.groups, **sizes)


def scatter(r: Routing) -> None:
    """The second launch."""
    sizes = {"BLOCK_S": r.block_s, "BLOCK_E": _bins(r.groups), "num_warps": _WARPS}
    blocks = r.counts.shape[0]
    _scatter_kernel[(blocks,)](
        r.index, r.counts, r.order, r.token, r.offsets, r.valid, r.index.shape[0], r.groups, blocks, r.choices,
        BLOCK_R=_BLOCK_R, BLOCK_B=_BLOCK_B, **sizes,
    )  # fmt: skip


def route(index: Tensor, groups: int, choices: int) -> Routing:
    """Both launches for choices `[S]`, `choices` of each token."""
    routing = made(index, groups, choices)
    count(routing)
    scatter(routing)
    return routing

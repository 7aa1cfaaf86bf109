"""From measured points to the ranges of M and R that an entry covers.

A range between two neighbours with one winner has that winner. Between different winners the border is their geometric
mean, since costs scale with ratios of sizes. No range reaches below the smallest or above the largest measured size.
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TypeVar

__all__ = ["Range", "rectangles", "split"]

Range = tuple[int, int]
_Winner = TypeVar("_Winner")


def split(winners: Mapping[int, _Winner]) -> list[tuple[Range, _Winner]]:
    """`((lowest, highest), winner)` of neighbouring ranges, ends included, from the winner at each measured size."""
    ranges: list[tuple[Range, _Winner]] = []
    sizes = sorted(winners)
    start = sizes[0]
    for former, size in pairwise(sizes):
        if winners[former] != winners[size]:
            middle = math.isqrt(former * size)
            ranges.append(((start, middle), winners[former]))
            start = middle + 1
    return [*ranges, ((start, sizes[-1]), winners[sizes[-1]])]


def rectangles(winners: Mapping[tuple[int, int], str]) -> list[tuple[Range, Range, str]]:
    """`(range of M, range of R, winner)` that do not overlap, from the winner at each measured `(M, R)`.

    Ranks whose ranges of M are the same are neighbours of one kind; other ranks are parted like different winners.
    """
    rows: dict[int, dict[int, str]] = {}
    for (M, R), winner in winners.items():
        rows.setdefault(R, {})[M] = winner
    by_rank = split({R: tuple(split(row)) for R, row in rows.items()}) if rows else []
    return [(of_m, of_r, winner) for of_r, row in by_rank for of_m, winner in row]

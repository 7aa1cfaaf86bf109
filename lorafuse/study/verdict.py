"""What a study may say: held, did not hold, or inconclusive, from the values of every seed; margins are set first."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["EDGE", "FAILED", "HELD", "INCONCLUSIVE", "Claim", "above", "at_most", "both", "inside", "overall"]

HELD, FAILED, INCONCLUSIVE = "held", "did not hold", "inconclusive"
EDGE = "the best learning rate is at an edge of the sweep"


@dataclass(frozen=True)
class Claim:
    """One thing that was claimed and what was found. `value` is the mean over seeds, `low` to `high` the spread."""

    claim: str
    outcome: str
    value: float
    low: float
    high: float
    margin: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def at_most(values: Sequence[float], margin: float) -> str:
    """Held when every seed is within the margin, did not hold when every seed is beyond it."""
    return inside(values, -math.inf, margin)


def inside(values: Sequence[float], low: float, high: float) -> str:
    """Held when every seed is inside, did not hold when every seed is outside on the same side."""
    if any(math.isnan(value) for value in values):
        return INCONCLUSIVE
    if low <= min(values) and max(values) <= high:
        return HELD
    return FAILED if max(values) < low or min(values) > high else INCONCLUSIVE


def above(high: Sequence[float], low: Sequence[float]) -> str:
    """Held when the spread of `high` lies wholly above that of `low`, did not hold when wholly below."""
    if any(math.isnan(value) for value in (*high, *low)):
        return INCONCLUSIVE
    if min(high) > max(low):
        return HELD
    return FAILED if max(high) < min(low) else INCONCLUSIVE


def both(outcomes: Iterable[str]) -> str:
    """Held when all are; did not hold when one did not."""
    found = list(outcomes)
    if FAILED in found:
        return FAILED
    return HELD if found and all(outcome == HELD for outcome in found) else INCONCLUSIVE


def claim(
    text: str, outcome: str, values: Sequence[float], *, margin: str, source: str, at_edge: bool = False
) -> Claim:
    """A claim with the spread of its values; one whose sweep ended at an edge is inconclusive, and says so."""
    if at_edge:
        outcome, margin = INCONCLUSIVE, f"{margin}; {EDGE}"
    return Claim(text, outcome, sum(values) / len(values), min(values), max(values), margin, source)


def overall(claims: Iterable[Claim]) -> str:
    return both(one.outcome for one in claims)

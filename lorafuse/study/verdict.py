"""What a study may say: held, did not hold or not decidable, by a test of paired differences against a margin.

A claim is that a mean over seeds lies between two bounds, fixed in advance. It held when the interval that each end
misses with probability 5% lies between them: two one-sided t-tests (TOST) where both bounds are finite, one where one
is. It did not hold when the interval lies wholly outside, at 5% over all claims of the study together, since one that
fails fails the study. For a study to hold every claim has to, which needs no correction.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorafuse.study import student

__all__ = ["ALPHA", "EDGE", "FAILED", "HELD", "UNDECIDED", "Claim", "claim", "overall"]

HELD, FAILED, UNDECIDED = "held", "did not hold", "not decidable"
EDGE = "a best learning rate is at an end of its grid"
ALPHA = 0.05


@dataclass(frozen=True)
class Claim:
    """One thing that was claimed and what was found.

    value, low, high: mean over seeds and its interval. power: the probability with which this test holds if the truth
    is `expected`, at the spread that was seen; needed: how many seeds would make it 80%, None above 1,000. bar: why
    nothing can be decided whatever the values are, "" where it can.
    """

    claim: str
    outcome: str
    value: float
    low: float
    high: float
    margin: str
    expected: float
    power: float
    needed: int | None
    bar: str
    source: str
    values: list[float]

    @property
    def shown(self) -> str:
        """The test in words: mean, interval, margin, power."""
        text = f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g}, n = {len(self.values)}); {self.margin}"
        more = "" if self.power >= 0.8 else f", 80% with {self.needed or 'more than 1,000'} seeds"
        text += f"; power {self.power:.0%} if it is {self.expected:g}{more}"
        return text + (f"; {self.bar}" if self.bar else "")


def claim(
    text: str,
    values: Sequence[float],
    low: float,
    high: float,
    *,
    expected: float,
    margin: str,
    source: str,
    claims: int = 1,
    bar: str = "",
) -> Claim:
    """Test the values of the seeds, one of `claims` of a study, against the bounds."""
    lower, upper = student.interval(values, ALPHA)
    least, most = student.interval(values, ALPHA / claims)
    outcome = HELD if low < lower and upper < high else FAILED if most < low or least > high else UNDECIDED
    strength, count = 0.0, None
    if math.isfinite(lower):
        spread = statistics.stdev(values)
        strength = student.power(spread, len(values), low, high, expected, ALPHA)
        count = student.needed(spread, low, high, expected, ALPHA)
    return Claim(
        text, UNDECIDED if bar else outcome, statistics.fmean(values), lower, upper, margin, expected, strength, count,
        bar, source, list(values),
    )  # fmt: skip


def overall(claims: Iterable[Claim]) -> str:
    """Held when all are; did not hold when one did not."""
    outcomes = [one.outcome for one in claims]
    if FAILED in outcomes:
        return FAILED
    return HELD if outcomes and all(outcome == HELD for outcome in outcomes) else UNDECIDED

"""Student's t for whole degrees of freedom, and the power of a test that an interval lies inside a margin."""

import functools
import math
import statistics
from collections.abc import Sequence

__all__ = ["cdf", "interval", "needed", "power", "quantile"]

# of the midpoint rule over the sample's standard deviation; the power is right to five digits (tests)
_POINTS = 400
_MOST = 1000


def cdf(t: float, freedom: int) -> float:
    """P(T <= t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        term, total = cosine, 0.0
        for k in range(1, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = 2 / math.pi * (angle + sine * total)
    else:
        term, total = 1.0, 0.0
        for k in range(0, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        inside = sine * total
    return (1 + inside) / 2


@functools.cache
def quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p, for p of 0.5 or more, by bisection."""
    low, high = 0.0, 1.0
    while cdf(high, freedom) < p:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle, freedom) < p else (low, middle)
    return high


def interval(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """The mean's interval, which each end misses with probability `alpha`. One value, or one that is NaN, has none."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return -math.inf, math.inf
    mean = statistics.fmean(values)
    half = quantile(1 - alpha, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def power(spread: float, count: int, low: float, high: float, expected: float, alpha: float) -> float:
    """Probability that `interval` of `count` normal values lies between `low` and `high`.

    Their mean is `expected`, their standard deviation `spread`. With one end infinite it is the power of a t-test, with
    both finite that of two one-sided tests (TOST, Schuirmann 1987): the integral over the sample's deviation, which is
    independent of its mean.
    """
    if count < 2:
        return 0.0
    if spread == 0:
        return float(low < expected < high)
    freedom, error = count - 1, spread / math.sqrt(count)
    t = quantile(1 - alpha, freedom)
    scale = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    most = 1 + 6 / math.sqrt(freedom)
    total = 0.0
    for point in range(_POINTS):
        ratio = (point + 0.5) * most / _POINTS
        density = math.exp(scale + (freedom - 1) * math.log(ratio) - freedom * ratio**2 / 2)
        above, below = ((end - expected) / error for end in (high, low))
        total += density * max(0.0, _normal(above - t * ratio) - _normal(below + t * ratio))
    return total * most / _POINTS


def needed(spread: float, low: float, high: float, expected: float, alpha: float, least: float = 0.8) -> int | None:
    """The least number of values with which `power` is at least `least`; None above 1,000."""
    if power(spread, _MOST, low, high, expected, alpha) < least:
        return None
    few, many = 1, _MOST
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if power(spread, middle, low, high, expected, alpha) >= least else (middle, many)
    return many


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))

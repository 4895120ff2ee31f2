"""Is a method better than another by more than seeds do? Differences at equal seeds, and their intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """``mean`` over ``seeds`` seeds of one value minus another of the same seed."""

    mean: float
    error: float | None
    """Standard error of the mean: the differences' sample standard deviation over √seeds; None for one seed."""
    seeds: int

    @property
    def half_width(self) -> float | None:
        """Half of the 95% interval of Student's t with seeds − 1 degrees of freedom; None for one seed."""
        return None if self.error is None else student_t(self.seeds - 1) * self.error

    @property
    def is_clear(self) -> bool:
        """Whether 0 lies outside of the interval. Differences that are all equal, of counts, show no spread: not so."""
        half = self.half_width
        return half is not None and 1e-9 * abs(self.mean) < half < abs(self.mean)


def paired_difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """Of two values by seed, over the seeds that both have; None if they have none in common."""
    found = [value - others[seed] for seed, value in values.items() if seed in others]
    if not found:
        return None
    error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else None
    return Difference(statistics.fmean(found), error, len(found))


@cache
def student_t(freedom: int) -> float:
    """The t that Student's distribution of so many degrees of freedom stays within, up or down, 95 times of 100."""
    low, high = 0.0, 16.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < LEVEL else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """The probability of −t to t (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle, odd = math.atan2(t, math.sqrt(freedom)), freedom % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for i in range(freedom // 2):
        total += term
        term *= (2 * i + 1 + odd) / (2 * i + 2 + odd) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total

"""Times a call: warm-up, device events, inputs that no cache holds, median and quartiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol

import torch

LEAD_CYCLES = 4_000_000
"""The GPU waits so long (about two milliseconds) before each timed call, so that the calls behind it are queued."""


class Clock(Protocol):
    """What ``measure`` reads time from."""

    def lead(self) -> None:
        """Let the host get ahead of the device."""

    def mark(self) -> Any:
        """A point in the device's queue."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Time between two marks, after ``synchronize``."""

    def synchronize(self) -> None:
        """Wait for the device; raises RuntimeError if a kernel failed."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    lower: float
    """First quartile."""
    upper: float
    """Third quartile."""
    repeats: int


def measure(
    clock: Clock,
    run: Callable[..., Any],
    sets: Sequence[tuple],
    *,
    budget: float,
    warmup: int = 3,
    at_least: int = 7,
    at_most: int = 200,
) -> Timing:
    """Time ``run(*inputs)`` over ``sets`` of inputs in turn, for about ``budget`` seconds.

    Raises what ``run`` raises, and RuntimeError for a kernel that failed.
    """
    for i in range(max(warmup, len(sets))):
        run(*sets[i % len(sets)])
    clock.synchronize()
    once = statistics.median(_timed(clock, run, sets, 3))
    repeats = min(at_most, max(at_least, int(budget / max(once, 1e-9))))
    times = sorted(_timed(clock, run, sets, repeats))
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else times * 3
    return Timing(median, lower, upper, repeats)


def _timed(clock: Clock, run: Callable[..., Any], sets: Sequence[tuple], repeats: int) -> list[float]:
    marks = []
    for i in range(repeats):
        clock.lead()
        begin = clock.mark()
        run(*sets[i % len(sets)])
        marks.append((begin, clock.mark()))
    clock.synchronize()
    return [clock.seconds(begin, end) for begin, end in marks]


def set_count(set_bytes: int, cache_bytes: int, at_most: int = 8) -> int:
    """How many sets of inputs are together three times what the cache holds."""
    return min(at_most, max(1, ceil(3 * cache_bytes / max(1, set_bytes))))


class CudaClock:
    """CUDA events."""

    def lead(self) -> None:
        torch.cuda._sleep(LEAD_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """The host's clock, for devices that compute at once."""

    def lead(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def synchronize(self) -> None:
        pass

"""How large a batch can be: halved where memory runs out; found by doubling, one step back from where it is short."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from diffprune.errors import InputError

Result = TypeVar("Result")
FASTER = 0.97  # a doubling that takes less than this share of the time per row was worth it


class Halving(Protocol):
    """A number of rows that can shrink."""

    rows: int

    def halve(self) -> bool: ...


class BatchSize:
    """How many rows go through a network at once, a multiple of 8. It can only shrink."""

    MINIMUM = 8

    def __init__(self, rows: int, minimum: int = MINIMUM) -> None:
        self.rows, self.minimum = max(self.MINIMUM, -(-rows // 8) * 8), minimum

    def halve(self) -> bool:
        """Half as many rows; False if that is not possible any more."""
        if self.rows <= self.minimum:
            return False
        self.rows = max(self.minimum, self.rows // 16 * 8)
        return True


class OutOfMemory(InputError):
    """Even the smallest batch does not fit."""


def fitting(
    work: Callable[[int], Result], size: Halving, advice: str, rows_of: Callable[[int], int] = lambda rows: rows
) -> Result:
    """`work(size.rows)`; where memory runs out the size is halved and it is called again.

    Raises: OutOfMemory, with `advice` and how many rows that were, `rows_of(size.rows)`, once it cannot be halved.
    """
    while True:
        try:
            return work(size.rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            found = str(error).partition("\n")[0]
        free_memory()  # out of the except block, whose traceback holds on to the batch's tensors
        if not size.halve():
            raise OutOfMemory(f"out of memory with the smallest batch, {rows_of(size.rows)} rows ({found}); {advice}")


def find_batch_size(attempt: Callable[[int], None], most: int, device: torch.device, memory: int | None) -> int:
    """Rows per batch, a multiple of 8 from 8 to about `most`.

    Args:
        attempt: runs a batch of so many rows, the costliest kind that will come; raises OutOfMemory if it does not fit.
        most: there is no use for more.
        memory: bytes that this process may hold on the CPU (half of what is free, by default). On a GPU memory is short
            when it runs out.

    Raises: InputError if not even 8 rows fit.
    """
    limit = None if device.type != "cpu" else memory or (free_bytes() // 2 + resident_bytes())
    best = rows = BatchSize.MINIMUM
    forget_peak()
    before, seconds_per_row = resident_bytes(), float("inf")
    while True:
        try:
            attempt(rows)  # what is made once only, such as a compiled graph, is not the batch's time
            start = time.perf_counter()
            attempt(rows)
            took = (time.perf_counter() - start) / rows
        except OutOfMemory:
            took = None
        free_memory()
        peak = peak_bytes()
        if took is None or (limit is not None and peak > limit):
            if rows == BatchSize.MINIMUM:
                raise InputError(f"batch_size: not even {rows} rows fit into memory; give more --memory")
            return best
        if rows > BatchSize.MINIMUM and took > FASTER * seconds_per_row:
            return best
        best, seconds_per_row = rows, took
        if rows >= most or (limit is not None and peak + max(0, peak - before) > limit):  # twice as many would not fit
            return best
        rows *= 2


def rows_that_fit(attempt: Callable[[int], None], wanted: int, memory: int | None) -> int:
    """``wanted`` rows per batch on the CPU, or half, or a quarter of them ...: as many as memory will hold, judged by
    what 8 take. There an allocation does not fail: the system ends the process.

    ``attempt`` and ``memory`` as for `find_batch_size`.
    """
    limit = memory or (free_bytes() // 2 + resident_bytes())
    attempt(BatchSize.MINIMUM)  # what libraries take once is not the rows'
    forget_peak()
    before = resident_bytes()
    attempt(BatchSize.MINIMUM)
    per_row = max(0, peak_bytes() - before) / BatchSize.MINIMUM
    while wanted > BatchSize.MINIMUM and before + wanted * per_row > limit:
        wanted //= 2
    return wanted


def free_bytes() -> int:
    """Memory that nobody uses: of the machine, or of this container if it has less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if most == "max" else min(free, max(0, int(most) - int(used)))
    except (OSError, StopIteration):  # not Linux, or no such limit
        return free


def resident_bytes() -> int:
    """What this process holds now; its peak where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def forget_peak() -> None:
    """From now on `peak_bytes` is what comes after this, where the system can do that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (where PyTorch has no class for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def free_memory() -> None:
    """Give back what nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

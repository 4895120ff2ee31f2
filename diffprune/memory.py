"""How large a batch can be: doubled until memory is short or it no longer helps, then one step back."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffprune.errors import InputError
from diffprune.scores.batches import BatchSize, OutOfMemory, free_memory

FASTER = 0.97  # a doubling that takes less than this share of the time per row was worth it


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


def peak_bytes() -> int:
    """The most that this process has held."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

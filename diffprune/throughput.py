"""How fast training goes: operations per image, the rate of matrix products that a device reaches, MFU."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

# A backward pass multiplies each of the forward's matrices twice: for the weight's gradient and for the input's.
FORWARDS_PER_STEP = 3

MEASURING = 0.3  # long enough for a moment without other work, and for threads and clocks to wake up


def step_operations(forward: Callable[[], object]) -> int:
    """Operations of a training step of one image, 2 per multiply-add: three times those of ``forward()``.

    ``forward`` is run on the meta device: nothing is computed. What activation checkpointing computes again is not
    counted, as is the custom of MFU (arXiv 2204.02311, appendix B).
    """
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return FORWARDS_PER_STEP * counter.get_total_flops()


@lru_cache(maxsize=8)
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product, measured now: the best of ``MEASURING`` seconds."""
    size = 8192 if device.type == "cuda" else 768
    one, two = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds: list[float] = []
    end = time.perf_counter() + MEASURING
    while len(seconds) < 5 or time.perf_counter() < end:
        _wait(device)
        begin = time.perf_counter()
        torch.mm(one, two)
        _wait(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

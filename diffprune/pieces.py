"""Images through a network, so many at a time as memory and a CPU's caches bear, with the same result for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffprune.memory import BatchSize, fitting

PIXELS_ON_CPU = 2**20  # that go through a network at once: 16 images of 256×256
LEAST = 16  # images at once: with fewer, PyTorch takes other convolutions on a CPU, depending on the number of threads


def piece_size(batch_size: int, height: int, width: int, device: torch.device) -> BatchSize:
    """At most ``batch_size`` images. On a CPU few: what they become inside a network should fit into its caches."""
    if device.type == "cpu":
        batch_size = min(batch_size, PIXELS_ON_CPU // (height * width))
    return BatchSize(max(LEAST, batch_size), minimum=LEAST)


def in_pieces(work: Callable[[list[int]], Tensor], count: int, size: BatchSize) -> Tensor:
    """``work(rows)`` for all rows below ``count``, joined along the first dimension.

    A multiple of 8 rows at a time, at least ``LEAST``; the last are filled up with the last row. So matrix libraries
    see no ragged edge, and a row's numbers depend neither on ``size`` nor on the rows beside it. Where memory runs out,
    half as many. Raises OutOfMemory where not even ``LEAST`` fit.
    """
    found: list[Tensor] = []
    start = 0

    def piece(most: int) -> Tensor:
        real = min(most, count - start)
        filled = max(LEAST, -(-real // 8) * 8)
        return work([start + min(row, real - 1) for row in range(filled)])[:real]

    while start < count:
        found.append(fitting(piece, size, "use a smaller model, or another device"))
        start += len(found[-1])
    return torch.cat(found)

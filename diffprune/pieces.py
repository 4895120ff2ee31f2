"""Images through a network, so many at a time as memory and a CPU's caches bear."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffprune.memory import fitting

PIXELS_ON_CPU = 2**20  # that go through a network at once: 16 images of 256×256
LEAST = 16  # images at once, unless fewer are asked for: with fewer PyTorch takes other convolutions on a CPU


class PieceSize:
    """How many images go through a network at once: a multiple of 8 from ``LEAST`` on, or just so many if fewer."""

    def __init__(self, batch_size: int, height: int, width: int, device: torch.device) -> None:
        if device.type == "cpu":
            batch_size = min(batch_size, max(LEAST, PIXELS_ON_CPU // (height * width)))
        self.rows = batch_size if batch_size < LEAST else -(-batch_size // 8) * 8

    def halve(self) -> bool:
        """Half as many; False for a single one."""
        if self.rows == 1:
            return False
        self.rows = max(LEAST, self.rows // 16 * 8) if self.rows > LEAST else self.rows // 2
        return True

    def filled(self, images: int) -> int:
        """How many so many are filled up to."""
        return self.rows if self.rows < LEAST else max(LEAST, -(-images // 8) * 8)


def in_pieces(work: Callable[[list[int]], Tensor], count: int, size: PieceSize) -> Tensor:
    """``work(rows)`` for all rows below ``count``, at least one, joined along the first dimension.

    Pieces are filled up with their last row, so that matrix libraries see no ragged edge: then a row's numbers seldom
    depend on ``size`` and on the rows beside it, and on a CPU with 1, 2, 4 or 8 threads never where ``size`` is at
    least ``LEAST`` (as far as was tried). Where memory runs out, half as many; OutOfMemory where not even one fits.
    """
    found: list[Tensor] = []
    start = 0

    def piece(most: int) -> Tensor:
        real = min(most, count - start)
        return work([start + min(row, real - 1) for row in range(size.filled(real))])[:real]

    while start < count:
        found.append(fitting(piece, size, "use a smaller model, or another device"))
        start += len(found[-1])
    return torch.cat(found)

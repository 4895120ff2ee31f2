"""Mean and covariance of features, folded block by block in float64."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import expect_tensor

_ROWS = 8192


class Gaussian:
    """Count, mean [D] and scatter matrix [D, D] (sum of outer products about the mean) of features seen so far.

    Blocks are folded one after the other (Chan, Golub & LeVeque 1983, eq. 2.1): the same blocks in the same order give
    the same bits, however many rows there are in all, and no float64 copy of the features is made. 2·N·D² operations.
    """

    def __init__(self, dimensions: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dimensions, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dimensions, dimensions, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, blocks: Iterable[Tensor]) -> Gaussian:
        """The Gaussian of features [N, D] in blocks (a tensor's rows count as one block)."""
        gaussian = None
        for block in [blocks] if isinstance(blocks, Tensor) else blocks:
            expect_tensor("features", block)
            gaussian = gaussian or cls(block.shape[1], block.device)
            gaussian.add(block)
        if gaussian is None:
            raise InputError("expected features, got no block of them")
        return gaussian

    def add(self, block: Tensor) -> None:
        """Fold features [n, D] in."""
        for rows in block.split(_ROWS):
            if not len(rows):
                continue
            centred = rows.double()
            mean = centred.mean(dim=0)
            centred = centred - mean
            shift, count = mean - self.mean, self.count + len(rows)
            self.scatter.addmm_(centred.T, centred)
            self.scatter.addr_(shift, shift, alpha=self.count * len(rows) / count)
            self.mean += shift * (len(rows) / count)
            self.count = count

    @property
    def covariance(self) -> Tensor:
        """[D, D] float64, unbiased: the scatter over count − 1."""
        if self.count < 2:
            raise InputError(f"expected at least 2 rows for a covariance, got {self.count}")
        return self.scatter / (self.count - 1)

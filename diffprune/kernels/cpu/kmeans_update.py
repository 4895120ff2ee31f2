"""``kmeans_update`` by blocks of rows, so that only a block of points is ever held in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cpu import refuse_device

BLOCK = 2**19
"""Elements held in float64: 4 MiB."""


def refuse(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> str | None:
    """Only CPU tensors."""
    return refuse_device(points, assignment, weights)


def run(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update.py``. On the CPU ``index_add_`` adds the rows one after the other, in one thread."""
    dimensions = points.shape[1]
    sums = torch.zeros(k, dimensions, dtype=torch.float64)
    rows = max(1, BLOCK // max(1, dimensions))
    index = assignment.long()
    for start in range(0, len(points), rows):
        own = slice(start, start + rows)
        block = points[own].double()
        if weights is not None:
            block = block * weights[own, None].double()
        sums.index_add_(0, index[own], block)
    if weights is None:
        return sums, index.bincount(minlength=k)
    return sums, torch.zeros(k, dtype=torch.float64).index_add_(0, index, weights.double())

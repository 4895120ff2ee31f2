"""Definition of ``kmeans_update``."""

from __future__ import annotations

import torch
from torch import Tensor


def run(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update.py``. Sorted, because ``index_add_`` adds in any order on a GPU."""
    ones = points.new_ones(len(points), dtype=torch.float64)
    columns = torch.cat([points.double(), ones[:, None]], dim=1)
    if weights is not None:
        columns = columns * weights.double()[:, None]
    lengths = assignment.bincount(minlength=k)
    rows = columns[assignment.argsort(stable=True)]
    sums = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0)
    return sums[:, :-1].clone(), lengths if weights is None else sums[:, -1].clone()

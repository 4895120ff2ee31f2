"""``kmeans_assign`` by blocks of rows: a matrix product, a certified minimum, and the distance of the one chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.cpu.search import BLOCK, Search, pair_sqdistances, smallest_per_row


def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``. 2·N·K·D operations; temporaries of at most max(256·K, BLOCK) elements."""
    dtype = compute_dtype(points, centroids)
    assignment = points.new_empty(points.shape[0], dtype=torch.int32)
    sqdistance = points.new_empty(points.shape[0], dtype=dtype)
    search, exact = Search(centroids, dtype, k=1), centroids.to(dtype)
    centred = search.centred(centroids)
    rows = max(256, BLOCK // max(centroids.shape))
    for block, index, square in zip(points.split(rows), assignment.split(rows), sqdistance.split(rows), strict=True):
        column = _nearest(search, centred, block)
        index.copy_(column)
        torch.sum((block.to(dtype) - exact[column]).square_(), dim=1, out=square)
    return assignment, sqdistance


def _nearest(search: Search, centred: Tensor, block: Tensor) -> Tensor:
    if len(centred) == 1:
        return block.new_zeros(len(block), dtype=torch.int64)
    x, bound = search.queries(block)
    v = torch.addmm(search.sqnorms, x, centred.T, alpha=-2)  # [b, K]
    row, column = (~(v > v.amin(dim=1, keepdim=True) + 2 * bound)).nonzero().unbind(dim=1)
    if len(row) == len(block):
        return column
    several = (row.bincount(minlength=len(block)) > 1)[row]
    value = x.new_zeros(len(row), dtype=torch.float64)
    value[several] = pair_sqdistances(block, search.points, row[several], column[several])
    return column[smallest_per_row(row, value, k=1)]

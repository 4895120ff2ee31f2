"""``kmeans_update``: rows sorted by centroid, then a thread per centroid and four dimensions adds them in order."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, address, refuse_inputs, where


def refuse(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> str | None:
    """Only CUDA tensors."""
    return refuse_inputs(points, weights, dtypes=tuple(DTYPES)) or refuse_inputs(assignment, dtypes=(torch.int32,))


def run(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update.py``. Reads the points once; the bytes are those of one addition after the other."""
    n, dimensions = points.shape
    if n == 0:
        totals = torch.zeros(k, dtype=torch.int64 if weights is None else torch.float64, device=points.device)
        return torch.zeros(k, dimensions, dtype=torch.float64, device=points.device), totals
    order, offsets = by_centroid(assignment, k)
    sums = torch.empty(k, dimensions, dtype=torch.float64, device=points.device)
    totals = None if weights is None else torch.empty(k, dtype=torch.float64, device=points.device)
    points, weights = points.contiguous(), None if weights is None else weights.double().contiguous()
    with where(points) as (extension, here):
        arrays = map(address, (points, order, offsets, weights, sums, totals))
        extension.kmeans_update(here, DTYPES[points.dtype], *arrays, k, dimensions)
    return sums, offsets.diff() if totals is None else totals


def by_centroid(assignment: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rows sorted by centroid [N], and where the rows of each begin [k + 1]: int64."""
    # A radix sort goes over the key's bytes: two of them are sorted in half the time of four.
    key = assignment.to(torch.int16) if k < 2**15 else assignment
    key, order = key.sort(stable=True)
    return order, torch.searchsorted(key, torch.arange(k + 1, dtype=key.dtype, device=key.device))

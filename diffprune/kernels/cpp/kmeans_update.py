"""``kmeans_update`` by rows sorted by centroid: N·D reads, shared among threads by centroid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffprune.kernels.cpp import TYPES, as_rows, extension
from diffprune.kernels.cpu import refuse_device


def refuse(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> str | None:
    """Only CPU tensors."""
    return refuse_device(points, assignment, weights)


def run(points: Tensor, assignment: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update.py``."""
    n, dimensions = points.shape
    sums = torch.empty(k, dimensions, dtype=torch.float64)
    counts = torch.empty(k, dtype=torch.int64)
    points, assignment = as_rows(points), assignment.contiguous()
    weights = None if weights is None else weights.double().contiguous()
    extension().kmeans_update(
        points.data_ptr(),
        TYPES[points.dtype],
        points.stride(0),
        assignment.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        n,
        k,
        dimensions,
        sums.data_ptr(),
        counts.data_ptr(),
        torch.get_num_threads(),
    )
    if weights is None:
        return sums, counts
    return sums, torch.zeros(k, dtype=torch.float64).index_add_(0, assignment.long(), weights)


def add_exactly(
    points: Tensor,
    to: Tensor,
    grids: Sequence[float],
    bins: Tensor,
    *,
    rows: Tensor | None = None,
    out_of: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Add points [N, D], or weights x points, to exact sums, ``bins`` [1 or 2, k, D] float64, of centroids ``to``.

    ``rows`` [n] int64: of these points only. ``out_of`` [n]: centroids from whose sums they are taken. ``to``,
    ``rows``, ``out_of`` and ``weights`` have one length. Each value is split into a multiple of ``grids[0]`` and, of
    what is left, the nearest multiple of ``grids[1]``, for one bin each. Without grids (and weights) it goes into the
    one bin as it is. See ``diffprune.kmeans_sums``.
    """
    points, to = as_rows(points), to.int().contiguous()
    out_of = None if out_of is None else out_of.int().contiguous()
    weights = None if weights is None else weights.double().contiguous()
    rows = None if rows is None else rows.contiguous()
    extension().add_exactly(
        points.data_ptr(),
        TYPES[points.dtype],
        points.stride(0),
        0 if rows is None else rows.data_ptr(),
        to.data_ptr(),
        0 if out_of is None else out_of.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        len(to),
        *bins.shape[1:],
        list(grids),
        bins.data_ptr(),
        torch.get_num_threads(),
    )

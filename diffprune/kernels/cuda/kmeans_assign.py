"""``kmeans_assign`` by float16 products on tensor cores that are certified, and float64 where they cannot decide.

The nearest centroid has the largest v (``rounded_columns.py``), which products give up to a bound E. Of each row the
two largest v and a bound of all others are kept: where the first leads by more than 2E it is certainly the nearest;
where only the second is as near, the two are compared in float64. Other rows are put on a list: their products are made
once more, and the centroids within 2E of the first, most often a few, are compared in float64; all of them only where
these are more than 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, HALF, address, refuse_inputs, where
from diffprune.kernels.rounded_columns import centre_of, round_columns

TILE = 256
"""Centroids are padded to a multiple of it, with values that never win."""


def refuse(points: Tensor, centroids: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(points, centroids, dtypes=(*HALF, torch.float32))


def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``."""
    n = len(points)
    assignment = torch.empty(n, dtype=torch.int32, device=points.device)
    sqdistance = torch.empty(n, dtype=torch.float32, device=points.device)
    if n > 0:
        search(points, centroids, assignment, sqdistance, points.new_zeros(2, 1 + n, dtype=torch.int32))
    return assignment, sqdistance


def search(points: Tensor, centroids: Tensor, assignment: Tensor, sqdistance: Tensor, lists: Tensor) -> None:
    """Writes ``assignment`` and ``sqdistance``; N at least 1.

    ``lists`` [2, 1 + N] int32, zeros, gets how many rows two candidates did not decide, and which; and likewise those
    of them that were compared with all centroids.

    Float16 points are multiplied as they are if D is a multiple of 8; others from a float16 copy, less the centre.
    """
    (n, dimensions), k = points.shape, centroids.shape[0]
    again, rest = lists
    points, centroids = points.contiguous(), centroids.float().contiguous()
    as_they_are = points.dtype == torch.float16 and dimensions % 8 == 0 and points.data_ptr() % 16 == 0
    padded = -(-dimensions // 8) * 8
    centre, rounded = centre_of(centroids), centroids.new_zeros(k, padded, dtype=torch.float16)
    offset, limits = round_columns(centroids, centre, rounded[:, :dimensions], whole=as_they_are)
    columns = torch.nn.functional.pad(offset.clamp(-1e38, 1e38), (0, -k % TILE), value=3e38)
    values = torch.empty(n, 4, dtype=torch.float32, device=points.device)
    candidates = torch.empty(n, 2, dtype=torch.int32, device=points.device)
    with where(points) as (extension, here):
        x, scale, norms = points, None, None
        if not as_they_are:
            x = torch.empty(n, padded, dtype=torch.float16, device=points.device)
            scale = torch.empty(n, dtype=torch.float32, device=points.device)
            norms = torch.empty(n, 2, dtype=torch.float32, device=points.device)
            arrays = map(address, (points, centre, x, scale, norms))
            extension.kmeans_round(here, DTYPES[points.dtype], *arrays, n, dimensions, padded)
        arrays = map(address, (x, rounded, columns, scale, limits, values, candidates))
        extension.kmeans_search(here, *arrays, n, k, padded, len(columns))
        arrays = map(address, (points, centroids, centre, values, candidates, norms, limits))
        results = map(address, (again, assignment, sqdistance))
        extension.kmeans_decide(here, DTYPES[points.dtype], *arrays, *results, n, k, dimensions)
        few = torch.empty(extension.kmeans_search_again_few(here, n), dtype=torch.int32, device=points.device)
        arrays = map(address, (points, centroids, x, rounded, columns, scale, limits, values, again, few, rest))
        results = map(address, (assignment, sqdistance))
        extension.kmeans_search_again(here, DTYPES[points.dtype], *arrays, *results, n, k, dimensions, padded)

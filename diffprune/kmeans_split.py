"""A start for many clusters: coarse clusters first, each split on its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffprune.kmeans_init import parallel, plus_plus
from diffprune.kmeans_lloyd import Lloyd
from diffprune.kmeans_points import HeldPoints, Points
from diffprune.orders import proportional_quotas

COARSE_ROUNDS = 10
FINE_ROUNDS = 5


def split_start(
    points: Points, k: int, generator: torch.Generator, largest: float, weights: Tensor | None = None
) -> Tensor:
    """[k, D] float32: √k clusters of all points, each then split into clusters in proportion to its size.

    About 25·√k·N distances in all, where one full round with k centroids takes k·N: for 50,000 clusters a ninth of it.
    """
    coarse = max(1, math.isqrt(k))
    lloyd = Lloyd(points, coarse, largest, weights)
    labels = lloyd.run(parallel(points, coarse, generator, largest, weights), COARSE_ROUNDS, 0.0).assignment.cpu()
    used = labels if weights is None else labels[(weights > 0).cpu()]
    numbers = torch.arange(points.rows) if weights is None else (weights > 0).nonzero().flatten().cpu()
    order = numbers[used.argsort(stable=True)]
    sizes = used.bincount(minlength=coarse).numpy()
    quotas = _at_least_one(sizes, k)
    centroids = []
    for rows, count in zip(order.split(sizes.tolist()), quotas.tolist(), strict=True):
        rows = rows.to(points.device)
        part = HeldPoints(points.take(rows), points.metric, None)
        own = None if weights is None else weights[rows]
        start = plus_plus(part, count, generator, own)
        distinct = len(torch.unique(part.data, dim=0))
        fine = Lloyd(part, count, largest, own).run(start, FINE_ROUNDS, 0.0).centroids if distinct >= count else start
        centroids.append(fine)
    return torch.cat(centroids)


def _at_least_one(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` in proportion to ``sizes``, but at least 1 each, where ``count`` is not less than their number."""
    rest = np.maximum(sizes - 1, 0)
    extra = proportional_quotas(rest, min(count - len(sizes), int(rest.sum()))) if rest.sum() else 0
    quotas = 1 + np.asarray(extra)
    quotas = np.broadcast_to(quotas, sizes.shape).copy()
    quotas[0] += count - int(quotas.sum())
    return quotas

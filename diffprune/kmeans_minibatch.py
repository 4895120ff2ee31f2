"""Centroids from random batches: a fraction of a full round's work, for a first look or as a start."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels import kmeans_assign, kmeans_update
from diffprune.kmeans_init import draw_rows
from diffprune.kmeans_points import Points

SMOOTHING = 0.3
"""Of the mean squared distance over batches."""

PATIENCE = 10
"""Batches without a better one, after which it stops."""


def minibatch(
    points: Points,
    centroids: Tensor,
    batch_size: int,
    epochs: int,
    tolerance: float,
    generator: torch.Generator,
    weights: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Minibatch k-means (Sculley, "Web-scale k-means clustering", 2010): the centroids [K, D], and the batches used.

    Each batch is drawn with replacement, by weight; each centroid is the mean of all points that it was nearest to so
    far. Stops after ``epochs`` times N points, or when the smoothed inertia has not fallen for ``PATIENCE`` batches, or
    the centroids' squared shifts sum to at most ``tolerance``.
    """
    centroids = centroids.clone()
    counts = torch.zeros(len(centroids), dtype=torch.float64, device=points.device)
    ones = torch.ones(points.rows, device=points.device)
    smoothed = best = float("inf")
    since = batches = 0
    while batches * batch_size < epochs * points.rows and since < PATIENCE:
        chances = torch.rand(batch_size, generator=generator, dtype=torch.float64).to(points.device)
        batch = points.take(draw_rows(chances, ones, weights).sort().values)
        assignment, sqdistance = kmeans_assign(batch, centroids)
        sums, joined = kmeans_update(batch, assignment, len(centroids))
        counts += joined
        rate = joined / counts.clamp(min=1)
        moved = centroids + rate[:, None] * (sums / joined.clamp(min=1)[:, None] - centroids)
        if points.metric == "cosine":
            length = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
            moved = torch.where(length > 0, moved / length, centroids.double())
        shift = float((moved - centroids).square().sum())
        centroids, batches = moved.float(), batches + 1
        inertia = float(sqdistance.double().cpu().numpy().mean())
        smoothed = inertia if smoothed == float("inf") else smoothed + SMOOTHING * (inertia - smoothed)
        since = 0 if smoothed < best else since + 1
        best = min(best, smoothed)
        if shift <= tolerance:
            break
    return centroids, batches

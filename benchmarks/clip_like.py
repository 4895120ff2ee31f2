"""Points like CLIP's embeddings of images, for benchmarks where no real ones are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_case import normal

ROUNDS, PER_CENTROID, BLOCK = 2, 64, 2**14


def clip_like(
    generator: torch.Generator, n: int, k: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Points [n, d] of ``dtype`` and length 1, and k centroids of theirs [k, d] float32, on the generator's device.

    A mean that all share, variances that decay, twice as many clusters as centroids. The centroids are those after two
    rounds of k-means over a sample, so that many points lie between two of them, as in k-means: on well separated
    clusters a filter would decide every row, and no search of the others would be measured.
    """
    device = generator.device
    spread = torch.arange(1, d + 1, device=device) ** -0.5
    mean = normal(generator, d, dtype=torch.float32)
    middles = normal(generator, 2 * k, d, dtype=torch.float32) * spread
    points = torch.empty(n, d, dtype=dtype, device=device)
    for block in points.split(BLOCK):
        own = torch.randint(0, 2 * k, (len(block),), generator=generator, device=device)
        noise = normal(generator, len(block), d, dtype=torch.float32)
        block.copy_(F.normalize(mean + middles[own] + 0.7 * spread * noise))
    sample = points[: PER_CENTROID * k]
    centroids = sample[torch.randperm(len(sample), generator=generator, device=device)[:k]].float()
    for _ in range(ROUNDS):
        centroids = _means(sample, centroids)
    return points, centroids


def _means(points: Tensor, centroids: Tensor) -> Tensor:
    """Of the points nearest to each centroid; of none: 0."""
    sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids), 1, device=centroids.device)
    for block in points.float().split(BLOCK):
        labels = (block @ centroids.mT - centroids.square().sum(dim=1) / 2).argmax(dim=1)
        sums.index_add_(0, labels, block)
        counts.index_add_(0, labels, torch.ones_like(block[:, :1]))
    return sums / counts.clamp(min=1)

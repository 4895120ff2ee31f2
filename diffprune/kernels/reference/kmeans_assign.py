"""Definition of ``kmeans_assign``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_assign.py``."""
    distances = torch.cdist(points.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distance, assignment = distances.min(dim=1)
    return assignment.int(), distance.square().to(compute_dtype(points, centroids))

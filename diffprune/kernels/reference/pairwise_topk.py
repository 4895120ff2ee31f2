"""Definition of ``pairwise_topk``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(queries: Tensor, points: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """See ``kernels/pairwise_topk.py``."""
    distances = torch.cdist(queries.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    if exclude_self:
        distances.fill_diagonal_(torch.inf)
    distances, indices = distances.sort(dim=1, stable=True)
    return distances[:, :k].to(compute_dtype(queries, points)), indices[:, :k].clone()

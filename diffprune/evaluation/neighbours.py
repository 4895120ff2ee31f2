"""Nearest neighbours by the fused kernel, with distances in float64."""

from __future__ import annotations

import torch

from diffprune.evaluation.features import TILE_BYTES
from diffprune.kernels import pairwise_topk


def nearest(
    queries: torch.Tensor,  # [N, D]
    points: torch.Tensor,  # [M, D]
    k: int,
    *,
    exclude_self: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [N, k] float64, ascending, and indices [N, k] int64 of each query's ``k`` nearest points.

    ``exclude_self``: the queries are the points, and row i leaves point i out. Equal distances go by index. The
    kernel's own distances are float32 for float32 features, too coarse to tell whether a point is on a ball's edge.
    """
    _, indices = pairwise_topk(queries, points, k, exclude_self=exclude_self)
    squared = torch.empty(indices.shape, dtype=torch.float64, device=queries.device)
    rows = max(1, TILE_BYTES // (8 * k * queries.shape[1]))
    for start in range(0, len(queries), rows):
        own = slice(start, start + rows)
        difference = queries[own, None].double() - points[indices[own]].double()
        squared[own] = difference.square().sum(dim=2)
    return squared, indices

"""Precision, recall, density and coverage: do samples fall where real images are, and the other way round?"""

from __future__ import annotations

import torch

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features, squared_distance_tiles
from diffprune.evaluation.neighbours import nearest


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, k: int = 3) -> dict[str, float]:
    """How two sets of features [N, D] and [M, D] cover each other; N, M > ``k``.

    A set's manifold is the union of closed balls around its points, each reaching to the point's ``k``-th nearest
    neighbour in the same set (itself left out).

    - ``precision``: share of samples inside the reference's manifold; ``recall``: share of reference points inside
      the samples' (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2). ``f_score``: their harmonic mean.
    - ``density``: reference balls around a sample, on average, divided by k (may exceed 1); ``coverage``: share of
      reference balls with a sample in them (Naeem et al. 2020, arXiv 2002.09797, eq. 4-5).

    Recall falls with fewer samples: compare at equal counts. Needs a tile of distances at a time, never N×M.
    Raises InputError for other shapes, NaN, or too few points.
    """
    if k < 1:
        raise InputError(f"precision_recall: expected k >= 1, got {k}")
    check_features(k + 1, samples=samples, reference=reference)
    balls_around_sample, covered = _membership(samples, reference, _squared_radii(reference, k))
    balls_around_reference, _ = _membership(reference, samples, _squared_radii(samples, k))
    precision = float((balls_around_sample > 0).double().mean())
    recall = float((balls_around_reference > 0).double().mean())
    return {
        "precision": precision,
        "recall": recall,
        "f_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "density": float(balls_around_sample.double().mean()) / k,
        "coverage": float(covered.double().mean()),
    }


def _squared_radii(points: torch.Tensor, k: int) -> torch.Tensor:
    distances, _ = nearest(points, points, k, exclude_self=True)
    return distances[:, -1]


def _membership(
    queries: torch.Tensor,  # [N, D]
    centres: torch.Tensor,  # [M, D]
    squared_radii: torch.Tensor,  # [M]
) -> tuple[torch.Tensor, torch.Tensor]:
    """In how many balls each query lies [N] int64, and whether each ball holds a query [M] bool."""
    balls = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    occupied = torch.zeros(len(centres), dtype=torch.bool, device=queries.device)
    for rows, squared in squared_distance_tiles(queries, centres):
        inside = squared <= squared_radii
        balls[rows] = inside.sum(dim=1)
        occupied |= inside.any(dim=0)
    return balls, occupied

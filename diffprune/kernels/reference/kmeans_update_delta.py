"""Definition of ``kmeans_update_delta``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.reference import kmeans_update


def run(points: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update_delta.py``; ``old`` and ``new`` are the assignments of the rows ``moved``."""
    joined, joins = kmeans_update.run(points[moved], new, len(sums), None)
    left, leaves = kmeans_update.run(points[moved], old, len(sums), None)
    return sums + joined - left, counts + joins - leaves

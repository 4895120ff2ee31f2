"""``kmeans_update_delta`` by blocks of the rows that moved."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.cpu import kmeans_update, refuse_device


def refuse(points: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> str | None:
    """Only CPU tensors."""
    return refuse_device(points, moved, old, new, sums, counts)


def run(points: Tensor, moved: Tensor, old: Tensor, new: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/kmeans_update_delta.py``."""
    rows = points[moved]
    joined, joins = kmeans_update.run(rows, new, len(sums), None)
    left, leaves = kmeans_update.run(rows, old, len(sums), None)
    return sums + joined - left, counts + joins - leaves

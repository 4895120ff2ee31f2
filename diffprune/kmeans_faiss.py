"""Centroids by faiss, to compare with or to choose: ``cluster --engine faiss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from diffprune.errors import InputError
from diffprune.kmeans_points import open_points


def faiss_centroids(
    points: Any,
    k: int,
    *,
    max_iter: int,
    seed: int,
    metric: str = "euclidean",
    keys: Sequence[str] | None = None,
    memory: int | None = None,
    tol: float = 0.0,
) -> np.ndarray:
    """[k, D] float32 by ``faiss.Kmeans``, on all points, not on the 256 per centroid that it takes by default.

    Runs ``max_iter`` rounds, whatever ``tol``, and holds the points in float32, whatever ``memory``.
    """
    try:
        import faiss
    except ImportError:
        raise InputError("engine 'faiss' needs the package faiss-cpu or faiss-gpu: pip install faiss-cpu") from None
    data = open_points(points, metric=metric, memory=memory)
    data.check(keys=keys)
    if data.rows < k:
        raise InputError(f"k-means: expected at least k={k} points, got {data.rows}; lower k")
    rows = np.empty((data.rows, data.dimensions), np.float32)
    for own, block in data.blocks():
        rows[own] = block.float().cpu().numpy()
    trained = faiss.Kmeans(
        data.dimensions,
        k,
        niter=max_iter,
        seed=seed,
        spherical=metric == "cosine",
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, -(-data.rows // k)),
    )
    trained.train(rows)
    return np.array(trained.centroids, np.float32).reshape(k, data.dimensions)

"""Hierarchical k-means: clusters of clusters, for large k and for balanced sampling.

Vo et al., "Automatic data curation for self-supervised learning: a clustering-based approach", 2024: k-means alone
gives most of its clusters to the dense parts of the data. Clustering the centroids again, and again, with points near
their centroids resampled, spreads the clusters evenly; sampling from the top level down then flattens the data's skew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kmeans import KMeans
from diffprune.orders import equal_quotas, within_clusters
from diffprune.rank_talk import ALONE, RankTalk

MANY = 4096
"""Clusters from which on "split" is the default start."""

PARTS = ("random", "nearest", "farthest")


@dataclass
class Level:
    """One level: clusters of the points (level 0) or of the centroids of the level below.

    ``centroids`` float32 [k, D]; ``assignment`` int32 and ``distance`` float32 of the n elements that it clusters.
    """

    centroids: Any
    assignment: Any
    distance: Any
    inertia: float


class HierarchicalKMeans:
    """k-means on the points, then k-means on its centroids, and so on. Exact and deterministic as ``KMeans`` is.

    Args:
        ks: numbers of clusters, level by level, falling: (50_000, 5_000, 500). The first is best started with
            ``init="split"``, the default for 4096 and more clusters, which costs about √k·N distances instead of k·N.
        init: of the first level: as ``KMeans``, or "split", see ``split_start``; the others use "k-means++".
        resample: how often each level above the first is clustered anew, from a start of its own, on the elements
            nearest to its centroids, as many from each cluster (the paper's resampling, which it does on the first
            level too, 10 times in its code). The last of these centroids stand: they are no means of all elements.
        resample_share: how many of those: this share of a cluster's mean size, at least 1.
        max_iter, tol, metric, seed, memory: as ``KMeans``.

    After ``fit``: ``levels_``, a list of ``Level``; ``assignments_[i]`` int32 [N]: each point's cluster on level i.
    """

    levels_: list[Level]
    assignments_: list[Any]

    def __init__(
        self,
        ks: Sequence[int],
        *,
        init: Any = "auto",
        resample: int = 0,
        resample_share: float = 0.5,
        max_iter: int = 50,
        tol: float = 1e-4,
        metric: str = "euclidean",
        seed: int = 0,
        memory: int | None = None,
    ) -> None:
        ks = list(ks)
        if not ks or any(k < 1 for k in ks) or any(above >= below for below, above in pairwise(ks)):
            raise InputError(f"hierarchical k-means: expected falling numbers of clusters, got {ks}")
        if resample < 0 or not 0 < resample_share <= 1:
            raise InputError(
                f"hierarchical k-means: expected resample of at least 0 and a share in (0, 1], got {resample} and "
                f"{resample_share}"
            )
        self.ks, self.init, self.resample, self.resample_share = ks, init, resample, resample_share
        self.options: dict[str, Any] = {"max_iter": max_iter, "tol": tol, "metric": metric, "memory": memory}
        self.seed = seed

    def fit(self, points: Any, *, keys: Sequence[str] | None = None, talk: RankTalk = ALONE) -> HierarchicalKMeans:
        """Cluster ``points``, of any kind that ``KMeans.fit`` takes; returns self. Raises as ``KMeans.fit`` does."""
        init = self.init
        if isinstance(init, str) and init == "auto":
            init = "split" if self.ks[0] >= MANY else "k-means++"
        first = KMeans(self.ks[0], init=init, seed=self.seed, **self.options).fit(points, keys=keys, talk=talk)
        self.levels_ = [_level(first)]
        self.assignments_ = [first.assignment_]
        for depth, k in enumerate(self.ks[1:], start=1):
            level = self._above(self.levels_[-1].centroids, k, depth)
            self.levels_.append(level)
            below = self.assignments_[-1]
            self.assignments_.append(level.assignment[below.long() if isinstance(below, Tensor) else below])
        return self

    def sample(self, count: int, *, part: str = "random", seed: int | None = None) -> np.ndarray:
        """Rows of a balanced sample: [count] int64, ascending.

        From the top: ``count`` is shared equally over the clusters, what small ones lack is given by the others, and
        each share again over the clusters inside, down to the points: of each lowest cluster, "random" ones, or the
        "nearest" or "farthest" from its centroid. What a share does not divide goes one each to clusters drawn by
        ``seed``, as in the paper's code: the largest ones would be those of the dense parts. Raises InputError for
        more than there are.
        """
        bottom = _numpy(self.assignments_[0])
        if not 0 <= count <= len(bottom):
            raise InputError(f"hierarchical k-means: expected a count from 0 to the {len(bottom)} points, got {count}")
        if part not in PARTS:
            raise InputError(f"hierarchical k-means: expected part to be one of {', '.join(PARTS)}, got {part!r}")
        capacity = [np.bincount(_numpy(a), minlength=k) for a, k in zip(self.assignments_, self.ks, strict=True)]
        generator = np.random.default_rng(self.seed if seed is None else seed)
        quotas = equal_quotas(capacity[-1], count, generator.random(len(capacity[-1])))
        for below, level in zip(reversed(capacity[:-1]), reversed(self.levels_[1:]), strict=True):
            parents, priority = _numpy(level.assignment), generator.random(len(below))
            shares = np.zeros(len(below), np.int64)
            for parent in np.flatnonzero(quotas):
                inside = np.flatnonzero(parents == parent)
                shares[inside] = equal_quotas(below[inside], int(quotas[parent]), priority[inside])
            quotas = shares
        values = generator.random(len(bottom)) if part == "random" else _numpy(self.levels_[0].distance)
        return np.sort(within_clusters(bottom, quotas, values, "highest" if part == "farthest" else "lowest"))

    def _above(self, elements: Any, k: int, depth: int) -> Level:
        options = {**self.options, "memory": None}
        fitted = KMeans(k, seed=self.seed + depth, **options).fit(elements)
        for again in range(1, self.resample + 1):
            labels, distance = _numpy(fitted.assignment_), _numpy(fitted.distance_)
            sizes = np.bincount(labels, minlength=k)
            most = max(1, round(self.resample_share * len(labels) / k))
            rows = np.sort(within_clusters(labels, np.minimum(sizes, most), distance, "lowest"))
            kept = elements[torch.from_numpy(rows) if isinstance(elements, Tensor) else rows]
            # From the centroids that are there it would end where it began; a round of means over all elements would
            # draw the new ones back to where these are dense.
            learnt = KMeans(k, seed=self.seed + depth + again * len(self.ks), **options).fit(kept)
            fitted = KMeans(k, init=learnt.centroids_, **{**options, "max_iter": 0}).fit(elements)
        return _level(fitted)


def _level(fitted: KMeans) -> Level:
    return Level(fitted.centroids_, fitted.assignment_, fitted.distance_, fitted.inertia_)


def _numpy(array: Any) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)

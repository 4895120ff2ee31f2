"""k-means in memory: exact assignments, no empty clusters, the same bytes for the same points and seed."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kernels import kmeans_assign, kmeans_update

METRICS = ("euclidean", "cosine")

Array = TypeVar("Array", Tensor, np.ndarray)


class KMeans:
    """Lloyd's k-means (Lloyd 1982) with k-means++ starts (Arthur and Vassilvitskii 2007).

    Each point goes to its nearest centroid exactly (see ``kernels.kmeans_assign``), and ``assignment_`` and
    ``distance_`` belong to ``centroids_`` as returned, not to those of a round before. No cluster is ever empty: a
    centroid without points restarts at the point farthest from its own centroid, the first of them if several are. The
    result is the same to the bit for the same points in the same order, seed and device; another order of the points is
    another sample of starts.

    Args:
        k: number of clusters.
        init: "k-means++", or the first centroids [k, D].
        max_iter: rounds of assignment and update at most.
        tol: stop when the squared shifts of all centroids sum to at most ``tol`` times the mean variance of the
            dimensions (scikit-learn's meaning). 0 runs until nothing moves.
        metric: "euclidean", or "cosine": points and centroids are scaled to length 1 (spherical k-means, Dhillon and
            Modha 2001).
        seed: of the starts; used by k-means++ alone.
        n_init: number of starts; the one with the smallest inertia is kept.

    After ``fit``, of the kind of the points (torch tensors on their device, or NumPy arrays):
        ``centroids_`` float32 [k, D]; ``assignment_`` int32 [N]; ``distance_`` float32 [N], Euclidean, to the own
        centroid (with "cosine" between scaled vectors); and the numbers ``inertia_``, the sum of squared distances, and
        ``n_iter_``, the rounds of the start that was kept.
    """

    centroids_: Any
    assignment_: Any
    distance_: Any
    inertia_: float
    n_iter_: int

    def __init__(
        self,
        k: int,
        *,
        init: str | Tensor | np.ndarray = "k-means++",
        max_iter: int = 100,
        tol: float = 1e-4,
        metric: str = "euclidean",
        seed: int = 0,
        n_init: int = 1,
    ) -> None:
        if k < 1 or max_iter < 1 or n_init < 1:
            raise InputError(f"k-means: expected k, max_iter and n_init of at least 1, got {k}, {max_iter}, {n_init}")
        if not tol >= 0:
            raise InputError(f"k-means: expected tol of at least 0, got {tol}")
        if metric not in METRICS:
            raise InputError(f"k-means: expected metric to be one of {', '.join(METRICS)}, got {metric!r}")
        if isinstance(init, str) and init != "k-means++":
            raise InputError(f"k-means: expected init to be 'k-means++' or centroids [k, D], got {init!r}")
        if not isinstance(init, str) and n_init > 1:
            raise InputError(f"k-means: given centroids are one start, expected n_init 1, got {n_init}")
        self.k, self.init, self.max_iter, self.tol = k, init, max_iter, tol
        self.metric, self.seed, self.n_init = metric, seed, n_init

    def fit(self, points: Array) -> KMeans:
        """Cluster ``points`` [N, D], a torch tensor or NumPy array of a floating dtype; returns self.

        float16 and bfloat16 are upcast by blocks, float64 is rounded to float32; "cosine" holds a scaled float32 copy.
        Raises InputError for fewer distinct points than k, and, with the rows, for NaN, infinity and, with "cosine",
        zero vectors.
        """
        data = self._prepared("points", points)
        if len(data) < self.k:
            raise _too_few(data, self.k)
        tolerance = self.tol * _variance(data)
        generator = torch.Generator().manual_seed(self.seed)
        starts = (self._start(data, generator) for _ in range(self.n_init))
        best = min((self._lloyd(data, start, tolerance) for start in starts), key=lambda fit: fit.inertia)
        self.centroids_, self.assignment_ = _like(points, best.centroids), _like(points, best.assignment)
        self.distance_ = _like(points, best.sqdistance.sqrt())
        self.inertia_, self.n_iter_ = best.inertia, best.rounds
        return self

    def predict(self, points: Array) -> Array:
        """The nearest centroid of each of ``points`` [M, D]: [M] int32."""
        if not hasattr(self, "centroids_"):
            raise InputError("k-means: predict needs centroids; call fit first")
        data = self._prepared("points", points)
        centroids = _tensor(self.centroids_).to(data.device)
        if data.shape[1] != centroids.shape[1]:
            raise InputError(f"k-means: expected points [M, {centroids.shape[1]}], got {tuple(data.shape)}")
        return _like(points, kmeans_assign(data, centroids)[0])

    def _prepared(self, name: str, array: Tensor | np.ndarray) -> Tensor:
        """[N, D], finite; float32 or half; of length 1 with "cosine"."""
        data = _tensor(array)
        if data.dim() != 2 or data.shape[1] == 0 or not data.is_floating_point():
            raise InputError(
                f"k-means: expected {name} [N, D] of a floating dtype, got {list(data.shape)} {data.dtype}"
            )
        if data.dtype == torch.float64:
            data = data.float()
        lowest, highest = data.aminmax(dim=1, keepdim=True)
        _refuse_rows(name, ~(lowest.isfinite() & highest.isfinite()), "NaN or infinity")
        if self.metric == "cosine":
            # The largest entry is divided out first: the squares of tiny vectors would vanish.
            largest = torch.maximum(-lowest, highest)
            _refuse_rows(name, largest == 0, "length 0, so no direction")
            data = data.float() / largest.float()
            data /= torch.linalg.vector_norm(data, dim=1, keepdim=True)
        return data

    def _start(self, points: Tensor, generator: torch.Generator) -> Tensor:
        if isinstance(self.init, str):
            return _plus_plus(points, self.k, generator)
        centroids = self._prepared("init", self.init).to(points.device, torch.float32)
        if centroids.shape != (self.k, points.shape[1]):
            raise InputError(f"k-means: expected init [{self.k}, {points.shape[1]}], got {list(centroids.shape)}")
        return centroids

    def _lloyd(self, points: Tensor, centroids: Tensor, tolerance: float) -> _Fit:
        rounds, shift = 0, math.inf
        while rounds < self.max_iter and shift > tolerance:
            centroids, assignment, _ = _assign(points, centroids)
            sums, counts = kmeans_update(points, assignment, self.k)
            if self.metric == "cosine":
                length = torch.linalg.vector_norm(sums, dim=1, keepdim=True)
                # Vectors that sum to 0 are equally far from every direction: their centroid stays.
                moved = torch.where(length > 0, sums / length, centroids.double()).float()
            else:
                moved = (sums / counts[:, None]).float()
            shift = _total((moved.double() - centroids.double()).square())
            centroids, rounds = moved, rounds + 1
        return _Fit(*_assign(points, centroids), rounds)


class _Fit:
    """One start, run to its end."""

    def __init__(self, centroids: Tensor, assignment: Tensor, sqdistance: Tensor, rounds: int) -> None:
        self.centroids, self.assignment, self.sqdistance, self.rounds = centroids, assignment, sqdistance, rounds
        self.inertia = _total(sqdistance)


def _assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The centroids with the empty ones restarted, and the points' assignment and squared distance to them.

    Ends, because a restarted centroid sits on a point on which no other sits, so it is never empty again.
    """
    while True:
        assignment, sqdistance = kmeans_assign(points, centroids)
        empty = (assignment.bincount(minlength=len(centroids)) == 0).nonzero().flatten()
        if len(empty) == 0:
            return centroids, assignment, sqdistance
        centroids = centroids.clone()
        for index in empty:
            farthest = sqdistance.argmax()
            if sqdistance[farthest] == 0:
                raise _too_few(points, len(centroids))
            centroids[index] = points[farthest]
            sqdistance = torch.minimum(sqdistance, kmeans_assign(points, centroids[index][None])[1])


def _plus_plus(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means++: the next centroid is a point drawn with probability D²/ΣD², D its distance to the centroids so far."""
    centroids = torch.empty(k, points.shape[1], device=points.device)
    centroids[0] = points[int(torch.randint(len(points), (1,), generator=generator))]
    _, sqdistance = kmeans_assign(points, centroids[:1])
    for i in range(1, k):
        cumulated = np.cumsum(sqdistance.cpu().numpy(), dtype=np.float64)  # NumPy adds in one order, torch by threads
        if cumulated[-1] == 0:
            raise _too_few(points, k)
        uniform = float(torch.rand((), generator=generator, dtype=torch.float64))
        # Below the total even after rounding, so that no point of probability 0 is drawn.
        threshold = min(uniform * cumulated[-1], math.nextafter(cumulated[-1], 0.0))
        centroids[i] = points[int(np.searchsorted(cumulated, threshold, side="right"))]
        sqdistance = torch.minimum(sqdistance, kmeans_assign(points, centroids[i : i + 1])[1])
    return centroids


def _variance(points: Tensor) -> float:
    """Mean over the dimensions of the points' variance; InputError where squared distances overflow."""
    everything = torch.zeros(len(points), dtype=torch.int32, device=points.device)
    sums, _ = kmeans_update(points, everything, 1)
    _, sqdistance = kmeans_assign(points, (sums / len(points)).float())
    total = _total(sqdistance)
    if not math.isfinite(total):
        raise InputError("k-means: the points' squared distances overflow float32; scale the points down")
    return total / points.numel()


def _total(values: Tensor) -> float:
    """Sum in float64 in an order that does not depend on the number of threads."""
    return float(values.cpu().numpy().sum(dtype=np.float64))


def _refuse_rows(name: str, bad: Tensor, why: str) -> None:
    if bool(bad.any()):
        rows = bad.flatten().nonzero().flatten().tolist()
        shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
        raise InputError(f"k-means: {len(rows)} of {len(bad)} {name} have {why}: rows {shown}; leave them out")


def _too_few(points: Tensor, k: int) -> InputError:
    distinct = len(torch.unique(points, dim=0))
    if distinct >= k:
        return InputError(f"k-means: {distinct} points differ, but squared distances vanish in float32; scale them up")
    return InputError(f"k-means: expected at least k={k} distinct points, got {distinct} ({len(points)} rows); lower k")


def _tensor(array: Tensor | np.ndarray) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    if not isinstance(array, np.ndarray):
        raise InputError(f"k-means: expected a torch tensor or a NumPy array, got {type(array).__name__}")
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _like(points: Array, result: Tensor) -> Array:
    return result if isinstance(points, Tensor) else result.numpy()

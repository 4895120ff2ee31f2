"""k-means: exact assignments, no empty clusters, the same bytes for a seed however the points are split."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.estimators import Clusterer
from diffprune.kernels import kmeans_assign
from diffprune.kernels.kmeans_assign import NearestOf
from diffprune.kmeans_init import parallel, plus_plus, random_rows
from diffprune.kmeans_lloyd import Fit, Lloyd, too_few
from diffprune.kmeans_minibatch import minibatch
from diffprune.kmeans_points import Points, as_tensor, open_points, refuse_rows
from diffprune.kmeans_rounds import Rounds
from diffprune.kmeans_split import split_start
from diffprune.kmeans_sums import ClusterSums, total
from diffprune.rank_talk import ALONE, RankTalk

METRICS = ("euclidean", "cosine")
INITS = ("k-means++", "k-means||", "random", "split")
ALGORITHMS = ("auto", "lloyd", "yinyang")


class KMeans(Clusterer):
    """Lloyd's k-means (Lloyd 1982), exact: each label is the nearest centroid (see ``kernels.kmeans_assign``).

    ``assignment_`` and ``distance_`` belong to ``centroids_`` as returned, not to those of a round before. No cluster
    is ever empty: a centroid without points restarts at the point farthest from its own centroid, the first of them if
    several are. Sums are exact (see ``kmeans_sums``), so the result is the same to the bit for the same points in the
    same order, seed and device, whatever the number of files, blocks, threads, and whichever ``algorithm``; another
    order of the points is another sample of starts.

    Args:
        k: number of clusters.
        init: "k-means++" (Arthur and Vassilvitskii 2007; k passes over the points), "k-means||" (Bahmani et al. 2012; 6
            passes), "random" (k different rows), "split" (for many clusters: √k of them, each split on its own), or the
            first centroids [k, D].
        max_iter: rounds of assignment and update at most; with ``batch_size``, passes over the points. 0 with given
            centroids: assign to them, but for those nearest to no point, which restart; see ``of_centroids``.
        tol: stop when the squared shifts of all centroids sum to at most ``tol`` times the mean variance of the
            dimensions (scikit-learn's meaning). 0 runs until no label changes.
        metric: "euclidean", or "cosine": points and centroids are scaled to length 1 (spherical k-means, Dhillon and
            Modha 2001).
        weights: [N], at least 0 and finite, how much each point counts; ``fit`` takes them too. By position, also where
            a pandas Series has an index.
        seed: of the starts and of minibatches; there is none that differs from run to run.
        n_init: number of starts; the one with the smallest inertia is kept.
        algorithm: "lloyd" computes every distance in every round; "yinyang" leaves out those that bounds rule out;
            "auto" does so once that is faster. All give the same bytes.
        batch_size: learn the centroids from random batches of so many points, at most all (Sculley 2010), instead of
            full rounds. The final assignment is exact all the same.
        memory: bytes of rows held at a time when the points are files; they are held whole if they fit.

    After ``fit``, of the kind of the points (torch tensors on their device, CuPy or NumPy arrays):
        ``centroids_`` float32 [k, D]; ``assignment_`` int32 [N]; ``distance_`` float32 [N], Euclidean, to the own
        centroid (with "cosine" between scaled vectors); and the numbers ``inertia_``, the weighted sum of squared
        distances, ``n_iter_``, the rounds of the start that was kept, and ``moved_``, how many labels each changed.
        ``centroids_`` may be set, [k, D], for ``predict`` and ``transform``; the rest then stays that of the fit.

    It is a step of scikit-learn's pipelines, and can be cloned there; nothing of scikit-learn is imported for that.
    """

    assignment_: Any
    distance_: Any
    inertia_: float
    n_iter_: int
    moved_: list[int]

    def __init__(
        self,
        k: int,
        *,
        init: str | Tensor | np.ndarray = "k-means++",
        max_iter: int = 100,
        tol: float = 1e-4,
        metric: str = "euclidean",
        weights: Tensor | np.ndarray | Sequence[float] | None = None,
        seed: int = 0,
        n_init: int = 1,
        algorithm: str = "auto",
        batch_size: int | None = None,
        memory: int | None = None,
    ) -> None:
        integers = {"k": k, "max_iter": max_iter, "n_init": n_init, "seed": seed, "batch_size": batch_size}
        for name, value in integers.items():
            if not (_is_integer(value) or (name == "batch_size" and value is None)):
                raise InputError(f"k-means: expected {name} as an integer, got {value!r}")
        if not -(2**63) <= seed < 2**64:
            raise InputError(f"k-means: expected a seed of 64 bits, got {seed}")
        if k < 1 or max_iter < isinstance(init, str) or n_init < 1:
            raise InputError(f"k-means: expected k, max_iter and n_init of at least 1, got {k}, {max_iter}, {n_init}")
        if not tol >= 0:
            raise InputError(f"k-means: expected tol of at least 0, got {tol}")
        for name, value, allowed in (("metric", metric, METRICS), ("algorithm", algorithm, ALGORITHMS)):
            if value not in allowed:
                raise InputError(f"k-means: expected {name} to be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(init, str) and init not in INITS:
            raise InputError(f"k-means: expected init to be {', '.join(INITS)} or centroids [k, D], got {init!r}")
        if not isinstance(init, str) and n_init > 1:
            raise InputError(f"k-means: given centroids are one start, expected n_init 1, got {n_init}")
        for name, number in (("batch_size", batch_size), ("memory", memory)):
            if number is not None and number < 1:
                raise InputError(f"k-means: expected {name} of at least 1, got {number}")
        self.k, self.init, self.max_iter, self.tol = k, init, max_iter, tol
        self.metric, self.weights, self.seed, self.n_init = metric, weights, seed, n_init
        self.algorithm, self.batch_size, self.memory = algorithm, batch_size, memory

    @classmethod
    def of_centroids(cls, centroids: Any, *, metric: str = "euclidean", memory: int | None = None) -> KMeans:
        """A k-means that is fitted already: ``centroids`` [k, D] of an earlier one, for ``predict`` and ``transform``.

        Unlike ``centroids_`` that are set, they stay as they are, with "cosine" too: labels and distances are its own.
        """
        given = open_points(centroids, metric="euclidean", name="centroids")
        given.check("centroids")
        fitted = cls(given.rows, metric=metric, memory=memory)
        fitted._centroids = given.like(given.take(torch.arange(given.rows)))
        return fitted

    def fit(
        self,
        points: Any,
        y: Any = None,
        *,
        weights: Tensor | np.ndarray | Sequence[float] | None = None,
        keys: Sequence[str] | None = None,
        talk: RankTalk = ALONE,
        rounds: str | os.PathLike | None = None,
    ) -> KMeans:
        """Cluster ``points``; returns self.

        Args:
            points: [N, D] of a floating dtype: a torch tensor, a NumPy or CuPy array; or, to be read from disk by
                blocks, a ``numpy.memmap`` or a list of arrays and paths of ``.npy`` files, each [n, D]. Half precision
                stays as it is, float64 is rounded to float32; "cosine" holds a scaled float32 copy of points in memory.
            y: ignored; what scikit-learn's pipelines hand to every step.
            weights: [N], instead of those of the constructor.
            keys: [N] names of the points, for errors: strings, or a column of pyarrow.
            talk: the processes that share the points, each having its own, in the order of ranks. All get the same
                centroids, and the labels of their points: the bytes that one process gets for all points.
            rounds: a file to keep the latest round in: a fit that is killed goes on from there. It must be of the same
                points and options, which is for you to know; it stays, and with ``n_init`` or ``batch_size`` there is
                none.

        Raises InputError for fewer distinct points than k; for NaN, infinity and, with "cosine", zero vectors, naming
        the points; for weights that are negative, not finite, all 0 or of another length.
        """
        data = open_points(points, metric=self.metric, memory=self.memory)
        weights = self.weights if weights is None else weights
        split = isinstance(self.init, str) and self.init == "split"
        if talk.size > 1 and (weights is not None or self.batch_size or split):
            raise InputError("k-means: points of several processes take no weights, batch_size or init split")
        data.share(talk)
        masses, unit = _weights(weights, data)
        largest = data.check(keys=keys)
        if data.total_rows < self.k:
            distinct = len(torch.unique(data.take(torch.arange(data.total_rows)), dim=0))
            raise too_few(self.k, distinct, data.total_rows)
        tolerance = self.tol * _variance(data, largest, masses) if self.tol > 0 or _may_overflow(data, largest) else 0.0
        generator = torch.Generator().manual_seed(index(self.seed))
        lloyd = Lloyd(data, self.k, largest, masses, self.algorithm)
        best: Fit | None = None
        kept = Rounds(Path(rounds), talk) if rounds and self.n_init == 1 and self.batch_size is None else None
        for _ in range(self.n_init):
            start = None if kept and kept.is_there() else self._start(data, generator, largest, masses)
            fit = self._run(lloyd, start, tolerance, generator, kept)
            if best is None or fit.inertia < best.inertia:
                best = fit
        self._centroids, self.assignment_ = data.like(best.centroids), data.like(best.assignment)
        self.distance_ = data.like(best.sqdistance.sqrt())
        self.inertia_, self.n_iter_, self.moved_ = best.inertia * unit, best.rounds, best.moved
        return self

    def predict(self, points: Any) -> Any:
        """The nearest centroid of each of ``points`` [M, D], of any kind that ``fit`` takes: [M] int32."""
        return self.nearest(points)[0]

    def nearest(self, points: Any, *, keys: Sequence[str] | None = None) -> tuple[Any, Any]:
        """The same, and the distance to it, [M] float32; ``keys`` [M] name the points in errors.

        A centroid that is nearest to none stays where it is.
        """
        data, centroids = self._fitted("predict", points, keys)
        assignment = torch.empty(data.rows, dtype=torch.int32, device=data.device)
        sqdistance = torch.empty(data.rows, device=data.device)
        nearest_of = NearestOf(centroids)
        for own, block in data.blocks():
            assignment[own], sqdistance[own] = nearest_of(block)
        return data.like(assignment), data.like(sqdistance.sqrt())

    def transform(self, points: Any) -> Any:
        """The distance of each of ``points`` [M, D] to each centroid: [M, k] float32."""
        data, centroids = self._fitted("transform", points)
        distance = torch.empty(data.rows, len(centroids), device=data.device)
        centre = centroids.double().mean(dim=0)
        c = centroids.double() - centre
        size = max(1, 2**22 // max(centroids.shape))
        for own, block in data.blocks():
            for start in range(0, len(block), size):
                x = block[start : start + size].double() - centre
                sizes = x.square().sum(dim=1)[:, None] + c.square().sum(dim=1)
                square = torch.addmm(sizes, x, c.T, alpha=-2)
                row, column = (square < 1e-6 * sizes).nonzero().unbind(dim=1)  # cancelled: by the differences
                square[row, column] = (x[row] - c[column]).square().sum(dim=1)
                distance[own.start + start : own.start + start + len(x)] = square.sqrt()
        return data.like(distance)

    @property
    def centroids_(self) -> Any:
        """[k, D] float32. Setting them raises InputError for what ``init`` would not be; "cosine" scales them."""
        try:
            return self._centroids
        except AttributeError:
            raise AttributeError("k-means: no centroids_ before fit") from None

    @centroids_.setter
    def centroids_(self, centroids: Any) -> None:
        given = self._given("centroids_", centroids)
        self._centroids = given.like(given.take(torch.arange(self.k)))

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "centroids_")

    def _fitted(self, what: str, points: Any, keys: Sequence[str] | None = None) -> tuple[Points, Tensor]:
        if not hasattr(self, "centroids_"):
            raise InputError(f"k-means: {what} needs centroids; call fit first")
        data = open_points(points, metric=self.metric, memory=self.memory)
        data.check(keys=keys)
        centroids = as_tensor("centroids_", self._centroids).to(data.device)
        if data.dimensions != centroids.shape[1]:
            raise InputError(f"k-means: expected points [M, {centroids.shape[1]}], got {(data.rows, data.dimensions)}")
        return data, centroids

    def _start(self, points: Points, generator: torch.Generator, largest: float, weights: Tensor | None) -> Tensor:
        if not isinstance(self.init, str):
            given = self._given("init", self.init, points.dimensions)
            return given.take(torch.arange(self.k)).to(points.device)
        if self.init in ("k-means||", "split"):
            start = parallel if self.init == "k-means||" else split_start
            return start(points, self.k, generator, largest, weights)
        return (plus_plus if self.init == "k-means++" else random_rows)(points, self.k, generator, weights)

    def _given(self, name: str, centroids: Any, dimensions: int | None = None) -> Points:
        """Centroids that are not k-means's own."""
        given = open_points(centroids, metric=self.metric, name=name)
        given.check(name)
        expected = [self.k, given.dimensions if dimensions is None else dimensions]
        if [given.rows, given.dimensions] != expected:
            shape = expected if dimensions is not None else f"[{self.k}, D]"
            raise InputError(f"k-means: expected {name} {shape}, got {[given.rows, given.dimensions]}")
        return given

    def _run(
        self, lloyd: Lloyd, start: Tensor | None, tolerance: float, generator: torch.Generator, kept: Rounds | None
    ) -> Fit:
        if self.batch_size is None:
            return lloyd.run(start, self.max_iter, tolerance, kept)
        size = min(self.batch_size, lloyd.points.rows)
        learnt, rounds = minibatch(lloyd.points, start, size, self.max_iter, tolerance, generator, lloyd.weights)
        fit = lloyd.run(learnt, 0, tolerance)
        fit.rounds = rounds
        return fit


def _is_integer(value: Any) -> bool:
    try:
        index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _weights(weights: Any, points: Points) -> tuple[Tensor | None, float]:
    """[N] float64 on the points' device, in units of the largest one's power of 2: of a sum only ratios count."""
    if weights is None:
        return None, 1.0
    values = as_tensor("weights", weights if hasattr(weights, "__dlpack__") else _array(weights))
    if values.is_complex():
        raise InputError(f"k-means: expected real weights, got {values.dtype}")
    values = values.to(points.device, torch.float64)
    if values.shape != (points.rows,):
        raise InputError(f"k-means: expected weights [{points.rows}], one for each point, got {list(values.shape)}")
    bad = ~(values.isfinite() & (values >= 0))
    refuse_rows("weights", bad.nonzero().flatten().tolist(), points.rows, "a value that is negative or not finite")
    if not bool((values > 0).any()):
        raise InputError("k-means: expected a weight above 0, got only zeros")
    unit = 2.0 ** min(max(math.frexp(float(values.max()))[1], -1000), 1000)
    return values / unit, unit


def _array(values: Any) -> np.ndarray:
    """Of a list, or of a pandas Series, by position."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InputError(f"k-means: expected weights [N] as an array or list of numbers ({error})") from error


def _may_overflow(points: Points, largest: float) -> bool:
    """Whether squared distances between points of this largest absolute coordinate could leave float32."""
    return points.dimensions * (2 * largest) ** 2 >= torch.finfo(torch.float32).max / 2


def _variance(points: Points, largest: float, weights: Tensor | None) -> float:
    """Mean over the dimensions of the points' variance; InputError where squared distances overflow."""
    sums = ClusterSums(1, points, largest, weights)
    for own, block in points.blocks():
        sums.add(block, own, torch.zeros(len(block), dtype=torch.int32, device=points.device))
    mean = sums.means().float()
    sqdistance = torch.empty(points.rows, device=points.device)
    for own, block in points.blocks():
        sqdistance[own] = kmeans_assign(block, mean)[1]
    summed = total(sqdistance, points.talk, points.total_rows)
    if not math.isfinite(summed):
        raise InputError("k-means: the points' squared distances overflow float32; scale the points down")
    if weights is None:
        return summed / (points.total_rows * points.dimensions)
    return total(sqdistance.double() * weights) / (total(weights) * points.dimensions)

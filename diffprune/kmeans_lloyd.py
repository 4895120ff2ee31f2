"""Lloyd's rounds over points in memory or on disk: exact labels, exact sums, no empty cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kernels import kmeans_assign
from diffprune.kernels.kmeans_assign import NearestOf
from diffprune.kmeans_bounds import GroupBounds
from diffprune.kmeans_points import Points
from diffprune.kmeans_rounds import Rounds
from diffprune.kmeans_sums import ClusterSums, total

GPU_CHECK_EVERY = 8
"""Rounds between two looks of the host at a GPU's results."""


@dataclass
class Fit:
    """One start, run to its end. ``assignment`` and ``sqdistance`` [N] belong to ``centroids`` [K, D]."""

    centroids: Tensor
    assignment: Tensor
    sqdistance: Tensor
    rounds: int
    inertia: float
    moved: list[int]  # points that changed their cluster, by round


class Lloyd:
    """Lloyd's rounds on one set of points."""

    def __init__(
        self, points: Points, k: int, largest: float, weights: Tensor | None = None, algorithm: str = "auto"
    ) -> None:
        """``largest`` bounds the points' absolute coordinates, ``weights`` [N] are at least 0 and not all 0."""
        self.points, self.k, self.weights, self.algorithm = points, k, weights, algorithm
        self.sums = ClusterSums(k, points, largest, weights)
        self.check_every = GPU_CHECK_EVERY if points.device.type == "cuda" else 1

    def run(self, centroids: Tensor | None, max_iter: int, tolerance: float, rounds_kept: Rounds | None = None) -> Fit:
        """Assign and update until the centroids move no more than ``tolerance``, no label changes, or ``max_iter``.

        ``tolerance`` is that of the sum of squared shifts. Ends with an assignment, so that labels are of the centroids
        that are returned. Without ``centroids`` it goes on from the round that ``rounds_kept`` has.
        """
        self.assignment = torch.full((self.points.rows,), -1, dtype=torch.int32, device=self.points.device)
        self.sqdistance = torch.empty(self.points.rows, device=self.points.device)
        self.sums.clear()
        self.bounds: GroupBounds | None = None
        self.shifts: Tensor | None = None
        self.moved = self.points.rows
        still = torch.zeros((), dtype=torch.bool, device=self.points.device)
        moves: list[int] = []
        rounds = 0
        if centroids is None:
            kept = rounds_kept.load(self.points.device)
            self._sweep(kept.last)  # its labels, and their sums
            centroids, moves, rounds = kept.following, kept.moved, len(kept.moved)
            still = self._shift(kept.last, centroids) <= tolerance
        while True:
            self._sweep(centroids)
            look = rounds % self.check_every == 0 or rounds == max_iter
            if look:
                centroids = self._without_empty(centroids)
            moved = self._all_moved()
            moves.append(moved)
            if rounds == max_iter or (look and (moved == 0 or bool(still))):
                break
            updated = torch.where(still, centroids, self._means(centroids))
            if self.bounds:
                self.bounds.shift(centroids, updated)
            still = self._shift(centroids, updated) <= tolerance
            if rounds_kept and look:
                rounds_kept.keep(centroids, updated, moves)
            centroids, rounds = updated, rounds + 1
        return Fit(centroids, self.assignment, self.sqdistance, rounds, self._inertia(), moves)

    def _shift(self, old: Tensor, new: Tensor) -> Tensor:
        """The sum of squared shifts."""
        squares = (new.double() - old.double()).square().sum(dim=1)
        self.shifts = squares.sqrt()
        return squares.sum()

    def _sweep(self, centroids: Tensor) -> None:
        """One pass over the points: labels, distances and sums for ``centroids``."""
        if self.points.device.type == "cuda":
            self._sweep_whole(centroids)
            return
        if self.bounds is None and self._want_bounds(centroids):
            self.bounds = GroupBounds(centroids, self.points.rows)
        self.moved = 0
        nearest_of = NearestOf(centroids)  # their values are finite: ``_means``
        for own, block in self.points.blocks():
            old = self.assignment[own]
            if self.bounds:
                new, sqdistance = self.bounds.assign(own, block, old, centroids)
            else:
                new, sqdistance = nearest_of(block)
            self.sqdistance[own] = sqdistance
            self._settle(own, block, old, new)

    def _want_bounds(self, centroids: Tensor) -> bool:
        if self.algorithm != "auto":
            return self.algorithm == "yinyang"
        return self.shifts is not None and GroupBounds.pay(self.points, centroids, self.shifts, self.moved)

    def _sweep_whole(self, centroids: Tensor) -> None:
        """The same on a GPU, where finding out which points moved would make the host wait.

        So would a check of the centroids.
        """
        self.sums.clear()
        for own, block in self.points.blocks():
            self.assignment[own], self.sqdistance[own] = kmeans_assign(block, centroids, check_values=False)
            self.sums.add(block, own, self.assignment[own])

    def _all_moved(self) -> int:
        """Points of all processes that changed their cluster."""
        return self.points.talk.count(self.moved)

    def _settle(self, own: slice, block: Tensor, old: Tensor, new: Tensor) -> None:
        rows = (old != new).nonzero().flatten()
        self.moved += len(rows)
        if len(old) and old[0] < 0:  # the first round: of no cluster yet
            self.sums.add(block, own, new)
        elif len(rows):
            self.sums.move(block, rows, rows + own.start, old[rows], new[rows])
        self.assignment[own] = new

    def _means(self, centroids: Tensor) -> Tensor:
        """Centroids of the present sums; where there is nothing to take the mean of, the old ones."""
        if self.points.metric == "cosine":
            # Vectors that sum to 0 are equally far from every direction: their centroid stays.
            sums = self.sums.sums()
            means = sums / torch.linalg.vector_norm(sums, dim=1, keepdim=True)
        else:
            means = self.sums.means()
        return torch.where(means.isfinite(), means, centroids.double()).float()

    def _without_empty(self, centroids: Tensor) -> Tensor:
        """The centroids, the empty ones restarted at the farthest points, with all labels, distances and sums.

        Farthest first: each restarts at the point that is then the farthest from its centroid, of equals the first.
        Ends, because such a centroid sits on a point on which no other sits, so it is never empty again.
        """
        while len(empty := (self.sums.counts() == 0).nonzero().flatten()):
            restarts = self._farthest(len(empty))
            centroids = centroids.clone()
            empty = empty[: len(restarts)]
            centroids[empty] = restarts
            for own, block in self.points.blocks():
                nearest, sqdistance = kmeans_assign(block, restarts)
                label, old = empty[nearest.long()].int(), self.assignment[own]
                closer = sqdistance < self.sqdistance[own]
                closer |= (sqdistance == self.sqdistance[own]) & self._beats(block, centroids, label, old)
                self.sqdistance[own] = torch.where(closer, sqdistance, self.sqdistance[own])
                self._settle(own, block, old, torch.where(closer, label, old))
        return centroids

    def _beats(self, block: Tensor, centroids: Tensor, label: Tensor, old: Tensor) -> Tensor:
        """[b] bool: as ``kmeans_assign`` would decide between two centroids equally far in float32."""
        new, now = ((block.double() - centroids[i.long()].double()).square().sum(dim=1) for i in (label, old))
        return (new < now) | ((new == now) & (label < old))

    def _farthest(self, count: int) -> Tensor:
        """[at most count, D]: farthest points first, each once those before it are centroids too.

        Only the farthest few of all points are looked at, as long as the farthest of them is farther than all others
        were; so there may be fewer than ``count``.
        """
        sqdistance, talk = self.sqdistance, self.points.talk
        if self.weights is not None:  # of no weight: no use as a cluster
            sqdistance = torch.where(self.weights > 0, sqdistance, -1.0)
        pool = min(self.points.total_rows, 4 * count + 64)
        floor = talk.gather(sqdistance.topk(min(pool, len(sqdistance))).values).topk(pool).values[-1]
        rows = talk.gather((sqdistance > floor).nonzero().flatten() + self.points.first_row)
        distance = talk.gather(sqdistance[sqdistance > floor])
        outside = float(floor)
        if len(rows) == 0:  # all that are farthest are equally far: take the first of them
            rows = talk.gather((sqdistance == floor).nonzero().flatten()[:1] + self.points.first_row)[:1]
            distance, outside = floor[None], math.inf
        candidates = self.points.take(rows)
        chosen: list[int] = []
        while len(chosen) < count:
            best = int((distance == distance.max()).nonzero()[0])
            if distance[best] <= 0 or (chosen and distance[best] <= outside):
                break
            chosen.append(best)
            distance = torch.minimum(distance, kmeans_assign(candidates, candidates[best : best + 1])[1])
        if not chosen:
            raise self._too_few()
        return candidates[chosen]

    def _too_few(self) -> InputError:
        """Every point sits on its centroid: there are as many distinct points as clusters that have any."""
        distinct, vanished = int((self.sums.counts() > 0).sum()), False
        for own, block in self.points.blocks():
            nearest = self.points.take_own(self._one_of_each(self.assignment))[self.assignment[own].long()]
            differs = (block.float() != nearest).any(dim=1)
            if self.weights is not None:
                differs &= self.weights[own] > 0
            vanished |= bool(differs.any())
        if self.points.talk.max(vanished):
            return InputError("k-means: points differ, but squared distances vanish in float32; scale them up")
        return too_few(self.k, distinct, self.points.total_rows, weighted=self.weights is not None)

    def _one_of_each(self, assignment: Tensor) -> Tensor:
        """[k] int64: the number of one point of each cluster, 0 for a cluster without."""
        rows = torch.zeros(self.k, dtype=torch.int64, device=assignment.device)
        used = torch.arange(len(assignment), device=assignment.device)
        if self.weights is not None:
            used = used[self.weights > 0]
        return rows.index_copy_(0, assignment[used].long().flip(0), used.flip(0))

    def _inertia(self) -> float:
        values = self.sqdistance if self.weights is None else self.sqdistance.double() * self.weights.double()
        return total(values, self.points.talk, self.points.total_rows)


class TooFewPointsError(InputError):
    """Fewer distinct points than clusters."""


def too_few(k: int, distinct: int, rows: int, weighted: bool = False) -> TooFewPointsError:
    """The error for fewer distinct points than clusters."""
    what = "distinct points of a weight above 0" if weighted else "distinct points"
    return TooFewPointsError(f"k-means: expected at least k={k} {what}, got {distinct} ({rows} rows); lower k")

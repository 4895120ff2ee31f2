"""Sums of the points of each cluster that do not depend on the order in which they are added.

A float64 sum is exact as long as all terms are multiples of one number g, and no partial sum passes 2^53·g. So each
term is split, x = high + low + rest, where high is x rounded to multiples of g = 2^(n-52)·(a power of two above the
largest |x|), n = log2(points) + 2, and low is what is left rounded to multiples of a g that is as much finer. What is
dropped is below 2^(2n-104) of the largest value. (Demmel and Nguyen, "Fast reproducible floating-point summation",
2013, with two bins.) float16 points of the usual size need no split at all: they are multiples of 2^-24.

Exact sums are the same to the bit for any order, split into shards, block size or number of threads; and points that
change their cluster can be added to one sum and taken from the other without a trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffprune.kernels import cpp, kmeans_update
from diffprune.kernels.cpp.kmeans_update import add_exactly
from diffprune.kmeans_points import Points
from diffprune.rank_talk import ALONE, RankTalk

CHUNK = 2**23
"""Elements that are split and added at a time, at least: 64 MiB in float32."""

PIECE = 2**15
"""Elements that a thread works on at a time, in its processor's cache."""

MANTISSA = 52

SMALLEST = -126
"""Exponent of float32's smallest normal number, whose inverse is finite."""

SMALLEST64 = -960
"""The same of float64, less the bits of a mantissa."""


@dataclass(frozen=True)
class _Change:
    """Points that come to clusters ``to`` [n], and leave ``out_of`` if given: a block, or its rows ``places``."""

    to: Tensor
    out_of: Tensor | None = None
    places: Tensor | None = None

    def signed(self) -> list[tuple[Tensor, int]]:
        """Labels, and whether the points are added to them or taken away."""
        return [(self.to, 1)] if self.out_of is None else [(self.to, 1), (self.out_of, -1)]

    def piece(self, own: slice) -> _Change:
        """Of points that were gathered."""
        return _Change(self.to[own], None if self.out_of is None else self.out_of[own])


class ClusterSums:
    """Σ w·x and Σ w of the points of each of ``k`` clusters."""

    def __init__(self, k: int, points: Points, largest: float, weights: Tensor | None = None) -> None:
        """``largest`` bounds the absolute coordinates of ``points``; ``weights`` [N] are at least 0."""
        self.k, self.weights, device, rows = k, weights, points.device, points.total_rows
        self.talk = points.talk
        self.own_counts = torch.zeros(k, dtype=torch.int64, device=device)
        if weights is not None:
            heaviest = float(weights.max())
            self.mass = _ExactSums(torch.zeros(2, k, 1, dtype=torch.float64, device=device), rows, heaviest)
            largest *= heaviest
        bins = torch.zeros(2, k, points.dimensions, dtype=torch.float64, device=device)
        self.total = _ExactSums(bins, rows, largest, points.prepared_dtype == torch.float16 and weights is None)

    def clear(self) -> None:
        """Back to no points."""
        self.own_counts.zero_()
        self.total.clear()
        if self.weights is not None:
            self.mass.clear()

    def add(self, points: Tensor, rows: slice | Tensor, assignment: Tensor) -> None:
        """Add ``points`` [b, D], which are the rows ``rows`` of all. Labels are trusted to be in range."""
        self._add(points, rows, _Change(assignment))

    def move(self, points: Tensor, places: Tensor, rows: Tensor, old: Tensor, new: Tensor) -> None:
        """Take ``points[places]``, the rows ``rows`` of all, from the clusters ``old`` and add them to ``new``."""
        self._add(points, rows, _Change(new, old, places))

    def counts(self) -> Tensor:
        """[k] int64: points of a weight above 0, of all processes."""
        return self.talk.sum(self.own_counts)

    def means(self) -> Tensor:
        """[k, D] float64: the centroids; NaN for a cluster without points."""
        return self.sums() / (self.counts().double() if self.weights is None else self.mass.value()[:, 0])[:, None]

    def sums(self) -> Tensor:
        """[k, D] float64, of all processes."""
        return self.total.value(self.talk)

    def _add(self, points: Tensor, rows: slice | Tensor, change: _Change) -> None:
        weights = None if self.weights is None else self.weights[rows]
        self.total.add(points, change, weights)
        if weights is not None:
            self.mass.add(weights[:, None], replace(change, places=None))
        ones = self.own_counts.new_ones(()) if weights is None else (weights > 0).long()
        for assignment, sign in change.signed():  # not by bincount: a GPU's makes the host wait
            self.own_counts.index_add_(0, assignment, ones.expand(len(assignment)), alpha=sign)


def total(values: Tensor, talk: RankTalk = ALONE, rows: int | None = None) -> float:
    """The sum of ``values`` [n], at least 0, of all processes: ``rows`` of them. Exact as above, so in any order."""
    reach = talk.max(float(values.max()) if len(values) else 0.0)
    if not 0 < reach < math.inf:
        return reach
    bits = math.ceil(math.log2(max(rows or len(values), 1))) + 2
    high = max(math.frexp(reach)[1] + bits - MANTISSA, SMALLEST64)
    grids = [2.0**high, 2.0 ** max(high + bits - MANTISSA, SMALLEST64)]
    bins = torch.zeros(2, dtype=torch.float64)
    for piece in values.split(4 * PIECE):
        rest = piece.to("cpu", torch.float64, copy=True)
        for number, grid in enumerate(grids):
            part = (rest / grid).round_().mul_(grid)
            bins[number] += part.sum()
            rest = rest - part  # not in place: it may be `values` itself
    return float(talk.sum(bins).sum())


class _ExactSums:
    def __init__(self, bins: Tensor, rows: int, largest: float, lossless: bool = False) -> None:
        """``bins`` [2, k, D] float64 zeros, for ``rows`` terms of at most ``largest`` each; ``lossless``: float16."""
        bits = math.ceil(math.log2(max(rows, 1))) + 2
        high = max(math.frexp(largest)[1] + bits - MANTISSA, SMALLEST)  # exponents of the grids
        low = max(high + bits - MANTISSA, SMALLEST)
        self.grids = [] if lossless and high <= -24 else [2.0**high, 2.0**low]
        self.bins = bins if self.grids else bins[:1]
        self.k = bins.shape[1]
        self.scratch = bins.new_empty(0)

    def clear(self) -> None:
        self.bins.zero_()

    def value(self, talk: RankTalk = ALONE) -> Tensor:
        bins = talk.sum(self.bins)
        return bins[0] if len(bins) == 1 else bins[0] + bins[1]

    def add(self, values: Tensor, change: _Change, weights: Tensor | None = None) -> None:
        if _in_cpp(values):
            more = {"rows": change.places, "out_of": change.out_of, "weights": weights}
            add_exactly(values, change.to, self.grids, self.bins, **more)
            return
        if change.places is not None:
            values = values[change.places]
        if not self.grids:
            self._add(self.bins[0], values, change)
            return
        size = max(1, max(CHUNK, self.bins[0].numel()) // values.shape[1])
        for start in range(0, len(values), size):
            own = slice(start, start + size)
            parts = self._split(values[own], None if weights is None else weights[own])
            for sums, part in zip(self.bins, parts, strict=True):
                self._add(sums, part, change.piece(own))

    def _add(self, sums: Tensor, values: Tensor, change: _Change) -> None:
        for assignment, sign in change.signed():
            if len(values) < self.k:  # less work than a table of all clusters; in whatever order, as nothing rounds
                sums.index_add_(0, assignment.long(), values.double(), alpha=sign)
            else:
                sums.add_(kmeans_update(values, assignment, self.k, check_values=False)[0], alpha=sign)

    def _split(self, values: Tensor, weights: Tensor | None) -> Tensor:
        """[2, b, D]: ``values``, times the ``weights``, as multiples of each grid."""
        # What holds a term, and so each of its parts, exactly.
        dtype = torch.float32 if weights is None and values.dtype != torch.float64 else torch.float64
        if self.scratch.dtype != dtype or self.scratch.numel() < 2 * values.numel():
            self.scratch = values.new_empty(2 * values.numel(), dtype=dtype)
        parts = self.scratch[: 2 * values.numel()].view(2, *values.shape)
        size = max(1, PIECE * torch.get_num_threads() // values.shape[1])
        for start in range(0, len(values), size):
            piece = slice(start, start + size)
            rest = values[piece].to(dtype)
            if weights is not None:
                rest = rest * weights[piece, None].double()
            high, low = parts[0, piece], parts[1, piece]
            torch.mul(rest, 1 / self.grids[0], out=high).round_().mul_(self.grids[0])  # exact but for the rounding
            torch.sub(rest, high, out=low).mul_(1 / self.grids[1]).round_().mul_(self.grids[1])
        return parts


def _in_cpp(values: Tensor) -> bool:
    return values.device.type == "cpu" and cpp.unavailable() is None

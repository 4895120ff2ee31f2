"""Sums of the points of each cluster that do not depend on the order in which they are added.

A float64 sum is exact as long as all terms are multiples of one number g, and no partial sum passes 2^53·g. So each
term is split, x = high + low + rest, where high is x rounded to multiples of g = 2^(n-52)·(a power of two above the
column's largest |x|), n = log2(points) + 1, and low is what is left rounded to multiples of a g that is as much finer.
What is dropped is below 2^(2n-104) of the column's largest value. (Demmel and Nguyen, "Fast reproducible floating-point
summation", 2013, with two bins.) float16 points of the usual size need no split at all: they are multiples of 2^-24.

Exact sums are the same to the bit for any order, split into shards, block size or number of threads; and points that
change their cluster can be added to one sum and taken from the other without a trace.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffprune.kernels import kmeans_update

CHUNK = 2**23
"""Elements that are split and added at a time, at least: 64 MiB in float32."""

PIECE = 2**15
"""Elements in the processor's cache."""

MANTISSA = 52

SMALLEST = -126
"""Exponent of float32's smallest normal number, whose inverse is finite."""


class ClusterSums:
    """Σ w·x and Σ w of the points of each of ``k`` clusters."""

    def __init__(self, k: int, rows: int, largest: Tensor, dtype: torch.dtype, weights: Tensor | None = None) -> None:
        """``largest`` [D] bounds |x| in each column, of ``rows`` points of ``dtype`` at most. ``weights`` [N] >= 0."""
        self.k, self.weights, self.device = k, weights, largest.device
        self.counts = torch.zeros(k, dtype=torch.int64, device=self.device)  # points of a weight above 0
        scale = largest.double()
        if weights is not None:
            heaviest = weights.max().double()[None]
            self.mass = _ExactSums(k, rows, heaviest)
            scale = scale * heaviest
        self.total = _ExactSums(k, rows, scale, lossless=dtype == torch.float16 and weights is None)

    def clear(self) -> None:
        """Back to no points."""
        self.counts.zero_()
        self.total.clear()
        if self.weights is not None:
            self.mass.clear()

    def add(self, points: Tensor, rows: slice | Tensor, assignment: Tensor) -> None:
        """Add ``points`` [b, D], which are the rows ``rows`` of all."""
        self._add(points, rows, assignment, 1)

    def move(self, points: Tensor, rows: Tensor, old: Tensor, new: Tensor) -> None:
        """Take ``points`` from the clusters ``old`` and add them to ``new``."""
        self._add(points, rows, new, 1)
        self._add(points, rows, old, -1)

    def means(self) -> Tensor:
        """[k, D] float64: the centroids; NaN for a cluster without points."""
        return self.sums() / (self.counts.double() if self.weights is None else self.mass.value()[:, 0])[:, None]

    def sums(self) -> Tensor:
        """[k, D] float64."""
        return self.total.value()

    def _add(self, points: Tensor, rows: slice | Tensor, assignment: Tensor, sign: int) -> None:
        if self.weights is None:
            self.total.add(points, assignment, sign)
            self.counts.add_(assignment.bincount(minlength=self.k), alpha=sign)
            return
        weights = self.weights[rows]
        self.total.add(points, assignment, sign, weights)
        self.mass.add(weights[:, None], assignment, sign)
        self.counts.add_(assignment[weights > 0].bincount(minlength=self.k), alpha=sign)


class _ExactSums:
    def __init__(self, k: int, rows: int, largest: Tensor, lossless: bool = False) -> None:
        bits = math.ceil(math.log2(max(rows, 1))) + 2
        high = torch.frexp(largest)[1] + bits - MANTISSA  # exponents of the grids
        high.clamp_(min=SMALLEST)
        low = (high + bits - MANTISSA).clamp_(min=SMALLEST)
        self.grids = [torch.ldexp(torch.ones_like(largest), exponent) for exponent in (high, low)]
        if lossless and bool((high <= -24).all()):
            self.grids = []
        shape = (max(1, len(self.grids)), k, len(largest))
        self.k, self.bins = k, torch.zeros(shape, dtype=torch.float64, device=largest.device)

    def clear(self) -> None:
        self.bins.zero_()

    def value(self) -> Tensor:
        return self.bins[0] if len(self.bins) == 1 else self.bins[0] + self.bins[1]

    def add(self, values: Tensor, assignment: Tensor, sign: int, weights: Tensor | None = None) -> None:
        if not self.grids:
            self.bins[0].add_(kmeans_update(values, assignment, self.k)[0], alpha=sign)
            return
        size = max(1, max(CHUNK, self.bins[0].numel()) // values.shape[1])
        for start in range(0, len(values), size):
            own = slice(start, start + size)
            for sums, part in zip(self.bins, self._split(values[own], weights, own), strict=True):
                sums.add_(kmeans_update(part, assignment[own], self.k)[0], alpha=sign)

    def _split(self, values: Tensor, weights: Tensor | None, own: slice) -> Tensor:
        """[2, b, D]: ``values``, times the ``weights``, as multiples of each grid."""
        # What holds a term, and so each of its parts, exactly.
        dtype = torch.float32 if weights is None and values.dtype != torch.float64 else torch.float64
        parts = values.new_empty(2, *values.shape, dtype=dtype)
        grids = [grid.to(dtype) for grid in self.grids]
        steps = [grid.reciprocal() for grid in grids]
        size = max(1, PIECE // values.shape[1])
        for start in range(0, len(values), size):
            piece = slice(start, start + size)
            rest = values[piece].to(dtype)
            if weights is not None:
                rest = rest * weights[own][piece, None].double()
            for part, grid, step in zip(parts, grids, steps, strict=True):
                torch.mul(rest, step, out=part[piece]).round_().mul_(grid)  # exact but for the rounding
                if part is not parts[-1]:
                    rest = rest - part[piece]
        return parts

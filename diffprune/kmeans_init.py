"""Where k-means starts. Every draw is exact, and the same however the points are split into files or blocks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffprune.draws import uniform
from diffprune.kernels import kmeans_assign
from diffprune.kernels.kmeans_assign import NearestOf
from diffprune.kmeans_lloyd import Lloyd
from diffprune.kmeans_points import HeldPoints, Points

DRAWN_AT_A_TIME = 2**17
"""Rows; making their random numbers takes 200 bytes each, on a GPU too."""

PARALLEL_ROUNDS = 5
PARALLEL_POLISH = 20
"""Rounds of weighted k-means on the candidates of k-means||."""

MANTISSA = 53


def plus_plus(points: Points, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """[k, D] float32: k-means++ (Arthur and Vassilvitskii 2007).

    The first is a point drawn by weight, the next one with probability w·D²/Σw·D², D its distance to those before.
    Nothing waits for the device; k passes over the points.
    """
    centroids = torch.empty(k, points.dimensions, device=points.device)
    sqdistance = torch.full((points.rows,), math.inf, device=points.device)
    for i, chance in enumerate(torch.rand(k, generator=generator, dtype=torch.float64).to(points.device)):
        mass = torch.ones_like(sqdistance) if i == 0 else sqdistance
        centroids[i] = points.take(draw_rows(chance[None], mass, weights, points))[0]
        for own, block in points.blocks():
            torch.minimum(sqdistance[own], kmeans_assign(block, centroids[i : i + 1])[1], out=sqdistance[own])
    return centroids


def parallel(
    points: Points, k: int, generator: torch.Generator, largest: float, weights: Tensor | None = None
) -> Tensor:
    """[k, D] float32: k-means|| (Bahmani et al., "Scalable k-means++", 2012), algorithm 2.

    Five rounds; in each, every point becomes a candidate with probability min(1, l·w·D²/Σw·D²), l = max(k/2, 16),
    independently. Then k-means++ and Lloyd on the candidates, weighed by the points that are nearest to them. One pass
    over the points for each round, whatever k is.
    """
    seed = int(torch.randint(2**32, (1,), generator=generator))
    chance = torch.rand(1, generator=generator, dtype=torch.float64).to(points.device)
    candidates = points.take(draw_rows(chance, torch.ones(points.rows, device=points.device), weights, points))
    fresh, owner = candidates, torch.zeros(points.rows, dtype=torch.int64, device=points.device)
    sqdistance = torch.full((points.rows,), math.inf, device=points.device)
    oversampling = max(k / 2, 16)
    for draw in range(PARALLEL_ROUNDS + 1):
        nearest_of = NearestOf(fresh)
        for own, block in points.blocks():
            nearest, square = nearest_of(block)
            closer = square < sqdistance[own]
            owner[own] = torch.where(closer, nearest.long() + len(candidates) - len(fresh), owner[own])
            sqdistance[own] = torch.where(closer, square, sqdistance[own])
        if draw == PARALLEL_ROUNDS:
            break
        rows = points.talk.gather(_drawn(seed, draw, shares(sqdistance, weights, points), oversampling, points))
        if len(rows) == 0:
            continue
        fresh = points.take(rows)
        candidates = torch.cat([candidates, fresh])
    if len(candidates) <= k:  # hardly any distinct points; Lloyd's rounds restart the copies
        return torch.cat([candidates, candidates[:1].expand(k - len(candidates), -1)])
    masses = (torch.ones_like(sqdistance) if weights is None else weights).double().cpu()
    masses = torch.zeros(len(candidates), dtype=torch.float64).index_add_(0, owner.cpu(), masses)
    masses = points.talk.sum(masses).to(points.device)
    few = HeldPoints(candidates, points.metric, candidates)
    start = plus_plus(few, k, generator, masses)
    distinct = len(torch.unique(candidates[masses > 0], dim=0))
    return Lloyd(few, k, largest, masses).run(start, PARALLEL_POLISH, 0.0).centroids if distinct >= k else start


def _drawn(seed: int, draw: int, parts: Tensor, oversampling: float, points: Points) -> Tensor:
    """The rows, among all processes', that become candidates: each with probability min(1, l·part/Σparts)."""
    everything, found = points.talk.sum(parts.sum()), []
    for start in range(0, len(parts), DRAWN_AT_A_TIME):
        own = parts[start : start + DRAWN_AT_A_TIME]
        rows = torch.arange(start, start + len(own), device=own.device) + points.first_row
        found.append(rows[uniform(seed, rows, "k-means||", draw) * everything < oversampling * own])
    return torch.cat(found) if found else torch.arange(0, device=parts.device)


def random_rows(points: Points, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """[k, D] float32: k different rows; with weights, of those above 0."""
    rows = torch.arange(points.total_rows) if weights is None else (weights > 0).nonzero().flatten().cpu()
    rows = rows[torch.randperm(len(rows), generator=generator)[:k]]
    return points.take(rows.repeat(math.ceil(k / max(1, len(rows))))[:k].to(points.device))


def draw_rows(chances: Tensor, mass: Tensor, weights: Tensor | None = None, points: Points | None = None) -> Tensor:
    """Rows drawn with probability w·mass/Σw·mass, one for each of ``chances`` [M] float64 in [0, 1): [M] int64.

    Of ``points`` that several processes share, ``mass`` is of those here, and rows are numbered among all.
    """
    ends = shares(mass, weights, points).cumsum(dim=0)
    if points is None or points.talk.size == 1:
        wanted = (chances * ends[-1]).long().clamp_(max=(ends[-1] - 1).clamp_(min=0))
        return torch.searchsorted(ends, wanted, right=True).clamp_(max=len(mass) - 1)
    sums = points.talk.gather(ends[-1:] if len(ends) else ends.new_zeros(1))
    before, everything = sums[: points.talk.rank].sum(), sums.sum()
    wanted = (chances * everything).long().clamp_(max=(everything - 1).clamp_(min=0)) - before
    here = (wanted >= 0) & (wanted < sums[points.talk.rank])
    rows = torch.where(here, torch.searchsorted(ends, wanted, right=True) + points.first_row, 0)
    return torch.where(everything > 0, points.talk.sum(rows), points.total_rows - 1)


def shares(mass: Tensor, weights: Tensor | None = None, points: Points | None = None) -> Tensor:
    """[N] int64, in proportion to w·mass, at least 1 where that is not 0; their sum is below 2^53.

    Whole numbers add up to the same in any order, and float64 holds their sum exactly.
    """
    mass = mass.double() if weights is None else mass.double() * weights.double()
    if points is None or points.talk.size == 1:
        count, largest = len(mass), mass.max()
    else:
        count = points.total_rows
        largest = mass.new_tensor(points.talk.max(float(mass.max()) if len(mass) else 0.0))
    spare = MANTISSA - math.ceil(math.log2(count + 1)) - 1
    return torch.ldexp(mass, spare - torch.frexp(largest)[1]).ceil_().long()

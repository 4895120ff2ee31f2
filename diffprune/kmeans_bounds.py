"""Exact k-means rounds that skip the centroids that cannot be the nearest, by bounds for groups of them.

Yinyang k-means (Ding et al. 2015): the centroids are in groups; each point keeps a lower bound of its distance to each
group, which falls by the group's largest shift from round to round. A group that is then farther than the point's own
centroid holds no nearest one, and its products are not computed. Late in the rounds few are left.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffprune.kernels import kmeans_assign, pairwise_topk
from diffprune.kmeans_points import Points

MOVED_SHARE = 0.1
"""Bounds are thought of once fewer points than this change their cluster in a round."""

LEAST_CENTROIDS, LEAST_POINTS = 256, 10_000
"""Below, a round is cheap as it is."""

ASKED = 512
"""Points whose gap between their two nearest centroids says whether bounds would hold."""

HOLD_ROUNDS = 4
HOLD_SHARE = 0.6
"""Bounds pay where this share of the points has a gap wider than so many rounds' shifts."""

GROUP_SIZE = 64


class GroupBounds:
    """Lower bounds of the distance of ``rows`` points to groups of centroids: float32 [N, groups]."""

    @staticmethod
    def pay(points: Points, centroids: Tensor, shifts: Tensor, moved: int) -> bool:
        """Whether to start with bounds, after ``moved`` points changed their cluster and centroids moved ``shifts``."""
        if len(centroids) < LEAST_CENTROIDS or points.rows < LEAST_POINTS or moved > MOVED_SHARE * points.rows:
            return False
        asked = points.take_own(torch.arange(0, points.rows, points.rows // ASKED))
        nearest, second = pairwise_topk(asked, centroids, 2)[0].unbind(dim=1)
        usual = shifts.quantile(1 - 1 / GROUP_SIZE)  # of the largest in a group
        return float((second - nearest > HOLD_ROUNDS * usual).double().mean()) > HOLD_SHARE

    def __init__(self, centroids: Tensor, rows: int) -> None:
        """Group these ``centroids`` [K, D]; the groups stay as they are while the centroids move."""
        k, dimensions = centroids.shape
        count = max(1, math.ceil(k / GROUP_SIZE))
        group = _group(centroids, count)
        members = [(group == g).nonzero().flatten() for g in range(count)]
        self.members = [member for member in members if len(member)]
        self.group_of = torch.empty(k, dtype=torch.int64)
        for g, member in enumerate(self.members):
            self.group_of[member] = g
        self.bound = torch.zeros(rows, len(self.members))
        # kmeans_assign rounds a squared distance to float32 in at most D + 4 steps.
        self.slack = (dimensions + 8) * 2.0**-23

    def shift(self, old: Tensor, new: Tensor) -> None:
        """The centroids move from ``old`` to ``new`` [K, D]: the bounds fall."""
        shifts = (new.double() - old.double()).square().sum(dim=1).sqrt()
        largest = torch.stack([shifts[member].max() for member in self.members])
        if bool((largest > 0).any()):
            self.bound.mul_(1 - 2.0**-22).sub_((largest * (1 + self.slack)).float())  # more than what rounding adds

    def assign(self, own: slice, block: Tensor, old: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """What ``kmeans_assign(block, centroids)`` gives, for the rows ``own`` whose labels were ``old`` [b]."""
        bound = self.bound[own]
        label = torch.full_like(old, -1)
        square = torch.full((len(block),), math.inf)
        home = self.group_of[old.clamp(min=0).long()]
        for g in range(len(self.members)):  # first each point's own group: it holds the nearest, but for a few
            self._search(g, (home == g).nonzero().flatten(), block, centroids, bound, label, square)
        for g in range(len(self.members)):
            reach = square.sqrt() * (1 + self.slack)
            rows = ((home != g) & (bound[:, g] <= reach)).nonzero().flatten()
            self._search(g, rows, block, centroids, bound, label, square)
        return label, square

    def _search(
        self, g: int, rows: Tensor, block: Tensor, centroids: Tensor, bound: Tensor, label: Tensor, square: Tensor
    ) -> None:
        """The nearest of group ``g`` for ``rows`` of the block; keeps it where it is nearer than the nearest so far."""
        if len(rows) == 0:
            return
        points = block if len(rows) == len(block) else block[rows]
        nearest, sqdistance = kmeans_assign(points, centroids[self.members[g]])
        found = self.members[g][nearest.long()].int()
        bound[rows, g] = sqdistance.sqrt() * (1 - self.slack)
        before, so_far = label[rows], square[rows]
        nearer = (sqdistance < so_far) | (before < 0)
        close = (before >= 0) & ((sqdistance - so_far).abs() <= self.slack * so_far)
        if bool(close.any()):  # float32 cannot tell: by the differences in float64, and ties to the smaller index
            i = close.nonzero().flatten()
            new, now = (
                (points[i].double() - centroids[labels[i].long()].double()).square().sum(dim=1)
                for labels in (found, before)
            )
            nearer[i] = (new < now) | ((new == now) & (found[i] < before[i]))
        label[rows] = torch.where(nearer, found, before)
        square[rows] = torch.where(nearer, sqdistance, so_far)


def _group(centroids: Tensor, count: int) -> Tensor:
    """[K]: which group each is in, a few rounds of k-means from every n-th one. Any grouping gives exact labels."""
    leaders = centroids[:: max(1, len(centroids) // count)][:count].clone()
    for _ in range(5):
        group = kmeans_assign(centroids, leaders)[0].long()
        sums = torch.zeros_like(leaders).index_add_(0, group, centroids)
        counts = group.bincount(minlength=len(leaders))[:, None]
        leaders = torch.where(counts > 0, sums / counts.clamp(min=1), leaders)
    return kmeans_assign(centroids, leaders)[0].long()

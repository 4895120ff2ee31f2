"""Nearest neighbours by the fused kernel, with distances in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from diffprune.evaluation.features import expect_tensor
from diffprune.kernels import pairwise_topk
from diffprune.kernels.cpu.search import pair_sqdistances

BLOCK_ROWS = 1 << 15


def nearest(
    queries: Tensor,  # [N, D]
    points: Tensor,  # [M, D]
    k: int,
    *,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Squared distances [N, k] float64, ascending, and indices [N, k] int64 of each query's ``k`` nearest points.

    ``exclude_self``: the queries are the points, and row i leaves point i out. Equal distances go by index. The
    kernel's own distances are float32 for float32 features, too coarse to tell whether a point is on a ball's edge.
    """
    _, indices = pairwise_topk(queries, points, k, exclude_self=exclude_self)
    return torch.stack([_squared(queries, points, column) for column in indices.T], dim=1), indices


def kth_squared(points: Tensor, k: int) -> Tensor:
    """Squared distance [N] float64 of each point to its ``k``-th nearest other one."""
    _, indices = pairwise_topk(points, points, k, exclude_self=True)
    return _squared(points, points, indices[:, -1])


def nearest_in_blocks(queries: Tensor, blocks: Iterable[Tensor], *, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared distance [N] float64 and index [N] int64 of the nearest of all points, which come in blocks [m, D].

    Indices count through all blocks; equal distances go to the smallest. ``own`` [N]: the index of the point that each
    query is, and that it leaves out. Where there is no point left the distance is infinite and the index −1.
    """
    best = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=queries.device)
    index = torch.full((len(queries),), -1, dtype=torch.int64, device=queries.device)
    start = 0
    for block in _joined(blocks):
        squared, found = nearest(queries, block, min(len(block), 1 if own is None else 2))
        found = found + start
        if own is not None:  # the second, where the first is the query itself; none, where it is alone
            squared = squared.masked_fill(found == own[:, None], torch.inf)
            second = (squared[:, :1] == torch.inf) & (squared.shape[1] > 1)
            squared, found = squared.gather(1, second.long()), found.gather(1, second.long())
        closer = squared[:, 0] < best
        best = torch.where(closer, squared[:, 0], best)
        index = torch.where(closer, found[:, 0], index)
        start += len(block)
    return best, index


def _joined(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in blocks of some thousand: a search over a few points costs as much as over many."""
    held: list[Tensor] = []
    for block in blocks:
        expect_tensor("a block of features", block)
        held.append(block)
        if sum(map(len, held)) >= BLOCK_ROWS:
            yield torch.cat(held)
            held = []
    if sum(map(len, held)):
        yield torch.cat(held)


def _squared(queries: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Squared distance [N] float64 of each query to the point of that index."""
    return pair_sqdistances(queries, points, torch.arange(len(queries), device=queries.device), index)

"""``pairwise_topk`` by tiles: a matrix product, the certified candidates, and their distances in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.cpu.search import BLOCK, Search, pair_sqdistances, smallest_per_row

TILE = 4096
"""Points per tile, for BLOCK / TILE queries."""


def run(queries: Tensor, points: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """See ``kernels/pairwise_topk.py``. 2·N·M·D operations; temporaries of a few BLOCK elements."""
    dtype = compute_dtype(queries, points)
    distances = queries.new_empty(queries.shape[0], k, dtype=dtype)
    indices = queries.new_empty(queries.shape[0], k, dtype=torch.int64)
    search = Search(points, dtype, k + exclude_self)
    rows = BLOCK // TILE
    for start in range(0, len(queries), rows):
        own = slice(start, start + rows)
        squared, indices[own] = _nearest(search, queries[own], k, start if exclude_self else None)
        distances[own] = squared.sqrt()
    return distances, indices


def _nearest(search: Search, block: Tensor, k: int, self_from: int | None) -> tuple[Tensor, Tensor]:
    """Squared distances [b, k] float64 and indices; row i does not see point ``self_from + i``."""
    x, bound = search.queries(block)
    lowest = x.new_full((len(block), k), torch.inf)  # the k smallest products so far
    row = column = x.new_empty(0, dtype=torch.int64)
    squared = x.new_empty(0, dtype=torch.float64)
    for start in range(0, len(search.points), TILE):
        own = slice(start, start + TILE)
        v = torch.addmm(search.sqnorms[own], x, search.centred(search.points[own]).T, alpha=-2)
        if self_from is not None:
            v.diagonal(self_from - start).fill_(torch.inf)
        width = min(k, v.shape[1])
        lowest = torch.cat([lowest, v.topk(width, largest=False).values], dim=1).topk(k, largest=False).values
        candidates = ~(v > lowest[:, -1:] + 2 * bound)
        if self_from is not None:
            candidates.diagonal(self_from - start).fill_(False)
        new_row, new_column = candidates.nonzero().unbind(dim=1)
        new_column += start
        row, column = torch.cat([row, new_row]), torch.cat([column, new_column])
        squared = torch.cat([squared, pair_sqdistances(block, search.points, new_row, new_column)])
        keep = smallest_per_row(row, squared, k)
        row, column, squared = row[keep], column[keep], squared[keep]
    return squared.view(len(block), k), column.view(len(block), k)

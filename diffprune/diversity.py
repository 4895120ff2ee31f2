"""Which rows cover or stand for all the others, by their embeddings: pure functions of arrays.

Rows come in key order, so that ties go to the smaller key; results are row numbers, [count] int64, in the order chosen.
Random numbers come in as an argument. Distances and kernels are made by tiles: nothing holds an N×N matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffprune.kernels import kmeans_assign

Advance = Callable[[int], None]

_TILE = 2**22  # elements of the largest temporary
_POOL = 2048  # rows among which k-center chooses between two passes over all
_SIDE = 2048  # of the tiles of similarities


def k_center(points: Tensor, count: int, first: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Greedy farthest-first traversal (Gonzalez 1985), in the order chosen; ``first`` is the row to begin with.

    Each next row is the one farthest (Euclidean) from all those chosen, which covers the set within twice the best
    possible radius. The distance of a row to those chosen only falls, so a choice among the rows that were farthest at
    the last pass over all is right until the best of them comes down to the others' level. Only then are all rows
    compared with the newly chosen ones, by ``kmeans_assign``; the size of that pool does not change the result.

    ``points`` [N, D], float16 or float32, finite; 2·N·D·count operations, memory O(N + tiles) beside the points.
    """
    gap = torch.full((len(points),), math.inf, device=points.device)  # squared distance to those chosen
    chosen = [first]
    news = [first]
    advance(1)
    while len(chosen) < count:
        torch.minimum(gap, kmeans_assign(points, points[news])[1], out=gap)
        gap[news] = -1  # never twice, even where all that is left are copies
        news = _farthest(points, gap, count - len(chosen))
        chosen += news
        advance(len(news))
    return np.array(chosen[:count])


def _farthest(points: Tensor, gap: Tensor, most: int) -> list[int]:
    """The next rows of the traversal, at least one and at most ``most``: as many as are certain."""
    values, pool = gap.topk(min(_POOL, len(gap)))
    level = values[-1] if len(pool) < len(gap) else -math.inf
    if values[0] == 0:  # nothing but copies of rows chosen: they come in key order
        return (gap == 0).nonzero().flatten()[:most].tolist()
    pool = pool.sort().values
    near, inside = points[pool].float(), gap[pool]
    rows: list[int] = []
    while len(rows) < most:
        best = inside.argmax()
        if not inside[best] > level:  # every row above the level is in the pool, so ties are too
            break
        rows.append(int(pool[best]))
        torch.minimum(inside, (near - near[best]).square_().sum(dim=1), out=inside)
        inside[best] = -1
    return rows or [int(gap.argmax())]


def herding(features: Tensor, count: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Kernel herding without replacement, in the order chosen (Chen, Welling & Smola 2010, eqs. 3 and 4).

    x_{t+1} = argmax ⟨w_t, φ(x)⟩, w_{t+1} = w_t + μ - φ(x_{t+1}), w_0 = μ = mean φ: the mean of the rows chosen
    stays close to the mean of all. ``features`` φ is [N, M] float32; 2·N·M·count operations, each step reading φ once.
    """
    mean = features.double().mean(dim=0) if features.numel() <= _TILE else _mean(features)
    toward_mean = features @ mean.float()
    weight = toward_mean.double()  # ⟨w_t, φ(x)⟩ of every row
    chosen = torch.empty(count, dtype=torch.int64, device=features.device)
    for step in range(count):
        row = weight.argmax()
        chosen[step] = row
        weight += toward_mean - features @ features[row]
        weight[row] = -math.inf
        advance(1)
    return chosen.cpu().numpy()


def fourier_features(points: Tensor, directions: Tensor, phases: Tensor, bandwidth: float) -> Tensor:
    """φ(x) = √(2/M)·cos(W·x/σ + 2πu): ⟨φ(x), φ(y)⟩ ≈ exp(-‖x-y‖²/2σ²) (Rahimi & Recht 2007). [N, M] float32.

    ``points`` [N, D], ``directions`` W [M, D] standard normal, ``phases`` u [M] uniform in [0, 1), ``bandwidth`` σ.
    """
    weights = (directions.double() / bandwidth).float().T.contiguous()
    shift = (2 * math.pi * phases.double()).float()
    features = torch.empty(len(points), len(phases), device=points.device)
    for tile, out in zip(points.split(_rows(points)), features.split(_rows(points)), strict=True):
        torch.addmm(shift, tile.float(), weights, out=out)
        out.cos_().mul_(math.sqrt(2 / len(phases)))
    return features


def median_distance(points: Tensor, rows: np.ndarray) -> float:
    """Median Euclidean distance between different points among ``rows`` (a few thousand); 1 if all are the same."""
    sample = points[torch.from_numpy(rows).to(points.device)].double().cpu().numpy()
    sample -= sample.mean(axis=0)
    norms = np.einsum("nd,nd->n", sample, sample)
    squares = norms[:, None] + norms[None, :] - 2 * sample @ sample.T
    squares = squares[np.triu_indices(len(sample), k=1)]
    squares = squares[squares > 1e-9 * norms.max(initial=0.0)]
    return float(np.sqrt(np.median(squares))) if len(squares) else 1.0


def near_duplicates(
    points: Tensor, cluster: np.ndarray, values: np.ndarray, eps: float, advance: Advance = lambda done: None
) -> np.ndarray:
    """SemDeDup (Abbas et al. 2023, arXiv 2303.09540, algorithm 1): [N] bool, the rows to leave out.

    Inside each cluster, rows are taken from the highest of ``values`` [N] down, ties by row; one is left out if its
    cosine similarity to an earlier one, left out itself or not, is above 1 - eps. Similarities are float32 by tiles;
    those within the rounding of the threshold are decided in float64, so that the answer does not depend on the tiles.
    ``points`` [N, D] are finite and not zero; operations D·Σn², n the clusters' sizes.
    """
    out = np.zeros(len(points), dtype=bool)
    order = np.argsort(-values, kind="stable")
    order = order[np.argsort(cluster[order], kind="stable")]
    for rows in np.split(order, np.cumsum(np.bincount(cluster))[:-1]):
        if len(rows) > 1:
            out[rows[_seen_before(points[torch.from_numpy(rows).to(points.device)], 1 - eps).cpu().numpy()]] = True
        advance(len(rows))
    return out


def _seen_before(points: Tensor, threshold: float) -> Tensor:
    """[n] bool: whether an earlier row's cosine similarity is above ``threshold``."""
    unit = torch.nn.functional.normalize(points.float(), eps=0)
    slack = (points.shape[1] + 8) * 2.0**-23  # of a product of two unit vectors, and of their scaling
    seen = torch.zeros(len(unit), dtype=torch.bool, device=points.device)

    for start in range(0, len(unit), _SIDE):
        rows = unit[start : start + _SIDE]
        for other in range(0, start + 1, _SIDE):
            similarity = rows @ unit[other : other + _SIDE].T
            if other == start:
                similarity = similarity.tril(diagonal=-1) + torch.full_like(similarity, -2).triu()
            seen[start : start + _SIDE] |= (similarity > threshold + slack).any(dim=1)
            doubtful = ((similarity - threshold).abs() <= slack) & ~seen[start : start + _SIDE, None]
            pairs = doubtful.nonzero()
            for block in pairs.split(max(1, _TILE // points.shape[1])):
                a, b = (points[block[:, i] + (start, other)[i]].double() for i in (0, 1))
                cosine = (a * b).sum(dim=1) / (a.square().sum(dim=1) * b.square().sum(dim=1)).sqrt()
                seen[start + block[cosine > threshold, 0]] = True
    return seen


def _mean(features: Tensor) -> Tensor:
    tiles = features.split(_rows(features))
    return torch.stack([tile.double().sum(dim=0) for tile in tiles]).sum(dim=0) / len(features)


def _rows(array: Tensor) -> int:
    return max(1, _TILE // array.shape[1])

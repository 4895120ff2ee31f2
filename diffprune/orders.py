"""Which rows an order keeps: pure functions of arrays.

Rows come in key order, so that ties go to the smaller key, and every function returns row numbers, [count] int64,
exactly as many as asked for. Random numbers come in as an argument. Nothing holds an N×N matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from diffprune.errors import InputError

Advance = Callable[[int], None]


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` rows with the lowest values [N], lowest first."""
    return np.argsort(values, kind="stable")[:count]


def highest(values: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` rows with the highest values [N], highest first."""
    return np.argsort(-values, kind="stable")[:count]


def middle(values: np.ndarray, count: int) -> np.ndarray:
    """The contiguous middle of the ascending ranking; of an odd number of rows left out, one more at its top."""
    start = (len(values) - count) // 2
    return np.argsort(values, kind="stable")[start : start + count]


def within_clusters(cluster: np.ndarray, quotas: np.ndarray, values: np.ndarray, part: str) -> np.ndarray:
    """Of each cluster c its ``quotas[c]`` rows with the "lowest", "highest" or "middle" values.

    ``cluster`` [N] holds numbers 0 to K-1, ``quotas`` is [K], ``values`` is [N].
    """
    order = np.lexsort((-values if part == "highest" else values, cluster))  # stable: ties stay in key order
    sizes = np.bincount(cluster, minlength=len(quotas))
    first = np.cumsum(sizes) - sizes
    if part == "middle":
        first += (sizes - quotas) // 2
    place = np.arange(len(cluster)) - first[cluster[order]]
    return order[(place >= 0) & (place < quotas[cluster[order]])]


def proportional_quotas(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` shared in proportion to cluster sizes [K], by largest remainder; ties go to the smaller number."""
    share = sizes.astype(np.int64) * count
    total = int(sizes.sum())
    quotas = share // total
    return _one_more(quotas, highest(share % total, count - int(quotas.sum())))


def balanced_quotas(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` shared equally; what K does not divide goes one each to the largest clusters, the smaller number first.

    Raises InputError if the smallest cluster cannot give its share.
    """
    most = len(sizes) * int(sizes.min())
    if count > most:
        raise InputError(
            f"balanced: {count} samples asked for, but {len(sizes)} clusters whose smallest has {sizes.min()} "
            f"give at most {most}; ask for fewer, or use order 'equal': what small clusters lack, others give"
        )
    return _one_more(np.full(len(sizes), count // len(sizes)), highest(sizes, count % len(sizes)))


def equal_quotas(sizes: np.ndarray, count: int) -> np.ndarray:
    """``count`` shared equally, but no cluster gives more than it has: quotas are min(size, level), water-filling.

    What is left over below the next whole level goes one each to the largest clusters, the smaller number first.
    """
    low, high = 0, int(sizes.max())
    while low < high:  # the highest level that does not need more than count
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.minimum(sizes, level).sum()) <= count else (low, level - 1)
    quotas = np.minimum(sizes, low)
    return _one_more(quotas, highest(sizes, count - int(quotas.sum())))


def whole_clusters(cluster: np.ndarray, cluster_order: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Whole clusters in ``cluster_order`` [K] until ``count`` is reached; of the last one those with lowest values."""
    sizes = np.bincount(cluster, minlength=len(cluster_order))[cluster_order]
    before = np.cumsum(sizes) - sizes
    quotas = np.empty(len(sizes), dtype=np.int64)
    quotas[cluster_order] = np.clip(count - before, 0, sizes)
    return within_clusters(cluster, quotas, values, "lowest")


def k_center(points: np.ndarray, count: int, first: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Greedy farthest-first traversal (Gonzalez 1985), in the order chosen; ``first`` is the row to begin with.

    Each next row is the one farthest (Euclidean) from all those chosen, which covers the set within twice the best
    possible radius. ``points`` [N, D] float32; time O(N·D·count), memory O(N·D).
    """
    points = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)  # less cancellation in ‖x‖² - 2xc + ‖c‖²
    norms = np.einsum("nd,nd->n", points, points)
    gap = np.full(len(points), np.inf, dtype=np.float32)
    chosen = np.empty(count, dtype=np.int64)
    row = first
    for step in range(count):
        chosen[step] = row
        np.minimum(gap, np.maximum(norms + norms[row] - 2 * (points @ points[row]), 0), out=gap)
        gap[row] = -1  # never twice, even where all that is left are copies of it
        row = int(np.argmax(gap))
        advance(1)
    return chosen


def herding(features: np.ndarray, count: int, advance: Advance = lambda done: None) -> np.ndarray:
    """Kernel herding without replacement, in the order chosen (Chen, Welling & Smola 2010, eqs. 3 and 4).

    x_{t+1} = argmax ⟨w_t, φ(x)⟩, w_{t+1} = w_t + μ - φ(x_{t+1}), w_0 = μ = mean φ: the mean of the rows chosen
    stays close to the mean of all. ``features`` φ is [N, M] float32; time O(N·M·count).
    """
    mean = features.mean(axis=0, dtype=np.float64)
    toward_mean = features @ mean.astype(np.float32)
    weight = toward_mean.astype(np.float64)  # ⟨w_t, φ(x)⟩ of every row
    chosen = np.empty(count, dtype=np.int64)
    for step in range(count):
        row = chosen[step] = int(np.argmax(weight))
        weight += toward_mean - features @ features[row]
        weight[row] = -np.inf
        advance(1)
    return chosen


def fourier_features(points: np.ndarray, directions: np.ndarray, phases: np.ndarray, bandwidth: float) -> np.ndarray:
    """φ(x) = √(2/M)·cos(W·x/σ + 2πu): ⟨φ(x), φ(y)⟩ ≈ exp(-‖x-y‖²/2σ²) (Rahimi & Recht 2007). [N, M] float32.

    ``points`` [N, D], ``directions`` W [M, D] standard normal, ``phases`` u [M] uniform in [0, 1), ``bandwidth`` σ.
    """
    features = points @ (directions / bandwidth).astype(np.float32).T
    features += (2 * math.pi * phases).astype(np.float32)
    np.cos(features, out=features)
    features *= np.float32(math.sqrt(2 / len(phases)))
    return features


def median_distance(points: np.ndarray, rows: np.ndarray) -> float:
    """Median Euclidean distance between different points among ``rows``; 1 if they are all the same point."""
    sample = points[rows].astype(np.float64)
    sample -= sample.mean(axis=0)
    norms = np.einsum("nd,nd->n", sample, sample)
    squares = norms[:, None] + norms[None, :] - 2 * sample @ sample.T
    squares = squares[np.triu_indices(len(sample), k=1)]
    squares = squares[squares > 1e-9 * norms.max(initial=0.0)]
    return float(np.sqrt(np.median(squares))) if len(squares) else 1.0


def _one_more(quotas: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    quotas = quotas.astype(np.int64)
    quotas[clusters] += 1
    return quotas

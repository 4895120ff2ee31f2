"""Do two models draw the same image from the same noise?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features
from diffprune.evaluation.neighbours import nearest


def same_seed_similarity(samples: Tensor, others: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """Cosine similarity of two models' images, row i of both [N, D] drawn from the same noise and label; N >= 2.

    Models of one data set map noise to nearly the same images (Kadkhodaie et al. 2024, arXiv 2310.02557): how much of
    that is left says how far pruning moved the model. Means in float64:

    - ``cosine``: of the pairs with the same noise; ``cosine_p5``: their 5th percentile.
    - ``cosine_other``: of all pairs with different noise, the baseline; ``cosine_same_label``: of those that share
      a label (``labels`` [N] int64), null without labels or where no two share one.
    - ``gain``: (cosine − baseline) / (1 − baseline), with the latter baseline where there is one: 1 for equal images,
      0 where the noise says nothing.
    - ``twins``: share of ``samples`` whose nearest of ``others``, by angle, is the one with the same noise.

    Raises InputError for other shapes, NaN, or a zero row.
    """
    check_features(2, samples=samples, others=others)
    if samples.shape != others.shape or (labels is not None and labels.shape != samples.shape[:1]):
        shapes = [None if x is None else tuple(x.shape) for x in (samples, others, labels)]
        raise InputError(f"expected samples and others [N, D] and labels [N], got {shapes}")
    x, y = (torch.nn.functional.normalize(rows.double(), dim=1, eps=0) for rows in (samples, others))
    for name, rows in (("samples", x), ("others", y)):
        if not rows.isfinite().all():
            raise InputError(f"{name}: row {int(rows.isfinite().all(dim=1).int().argmin())} is zero: it has no cosine")
    pairs = (x * y).sum(dim=1)
    count = len(x)
    other = (x.sum(dim=0) @ y.sum(dim=0) - pairs.sum()) / (count * (count - 1))
    same_label = None if labels is None else _mean_within_labels(x, y, pairs, labels)
    baseline = float(other) if same_label is None else same_label
    cosine = float(pairs.mean())
    _, index = nearest(x, y, 1)
    return {
        "count": count,
        "cosine": cosine,
        "cosine_p5": float(torch.quantile(pairs, 0.05)) if count < 1 << 24 else None,
        "cosine_other": float(other),
        "cosine_same_label": same_label,
        "gain": (cosine - baseline) / (1 - baseline) if baseline < 1 else None,
        "twins": float((index[:, 0] == torch.arange(count, device=x.device)).double().mean()),
    }


def _mean_within_labels(x: Tensor, y: Tensor, pairs: Tensor, labels: Tensor) -> float | None:
    """Mean of ⟨x_i, y_j⟩ over i ≠ j with one label, from the sums of each label."""
    classes, inverse = labels.unique(return_inverse=True)
    sums = [torch.zeros(len(classes), x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2)]
    for total, rows in zip(sums, (x, y), strict=True):
        total.index_add_(0, inverse, rows)
    counts = torch.bincount(inverse)
    number = int((counts * (counts - 1)).sum())
    return float(((sums[0] * sums[1]).sum() - pairs.sum()) / number) if number else None

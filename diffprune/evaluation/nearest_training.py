"""Memorization: are generated images nearer to the training images than other real images are?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from diffprune.evaluation.features import check_features
from diffprune.evaluation.neighbours import nearest_in_blocks

BASELINE_QUANTILE = 0.01


def memorization(
    samples: Tensor,
    training: Tensor | Iterable[Tensor],
    held_out: Tensor | None = None,
    *,
    left_out: tuple[Tensor, Tensor] | None = None,
    closest: int = 16,
) -> dict[str, Any]:
    """Distances of ``samples`` [N, D] to their nearest ``training`` image [M, D], beside a baseline's.

    The baseline is what real images that were not trained on do: ``held_out`` [H, D] to its nearest training image.
    Without held-out images it is each training image to its nearest other one (``"leave-one-out"``); then M >= 2.
    Held-out images left out by a score differ from the kept ones, so a baseline from a pruned set leans high where
    the kept images are typical.

    Args:
        training: a tensor, or blocks of one that can be gone through twice (a list, or a folder of embeddings).
        left_out: row numbers [H] and features [H, D] of the training images that make the leave-one-out baseline; all
            of them by default, which blocks cannot tell.
        closest: how many pairs to name.

    Returns ``baseline`` ("held-out" or "leave-one-out"), ``baseline_count``, ``median_distance`` of the samples,
    ``baseline_median``, ``baseline_p1`` (its 1st percentile, linearly interpolated), ``median_ratio`` (samples over
    baseline; under 1 is nearer than real images; null if the baseline's median is 0), ``share_below_p1`` (samples
    strictly nearer than the baseline's 1st percentile: 0.01 is what real images would give; null where that percentile
    is 0, as no distance is less: a hundredth of the baseline are copies of training images), and ``closest_pairs``:
    the ``closest`` nearest (sample row, training row, distance). Raises InputError for other shapes or NaN.
    """
    has_held_out = held_out is not None and len(held_out) > 0
    check_features(1, samples=samples)
    if isinstance(training, Tensor):
        check_features(1 if has_held_out else 2, training=training)
        check_features(1, samples=samples, training=training)
        left_out = left_out or (torch.arange(len(training), device=training.device), training)
        training = [training]
    squared, indices = nearest_in_blocks(samples, training)
    distances = squared.sqrt()
    if has_held_out:
        check_features(1, samples=samples, held_out=held_out)
        kind, baseline = "held-out", nearest_in_blocks(held_out, training)[0]
    else:
        rows, features = left_out
        check_features(1, samples=samples, left_out=features)
        kind, baseline = "leave-one-out", nearest_in_blocks(features, training, own=rows)[0]
    baseline = baseline.sqrt()
    median, baseline_median = float(_quantile(distances, 0.5)), float(_quantile(baseline, 0.5))
    p1 = _quantile(baseline, BASELINE_QUANTILE)
    order = distances.sort(stable=True).indices[:closest].tolist()
    return {
        "baseline": kind,
        "baseline_count": len(baseline),
        "median_distance": median,
        "baseline_median": baseline_median,
        "baseline_p1": float(p1),
        "median_ratio": median / baseline_median if baseline_median else None,
        "share_below_p1": float((distances < p1).double().mean()) if p1 > 0 else None,
        "closest_pairs": [(row, int(indices[row]), float(distances[row])) for row in order],
    }


def _quantile(values: Tensor, q: float) -> Tensor:
    """Linear interpolation, as ``torch.quantile`` does, which refuses more than 2²⁴ values."""
    ordered = values.sort().values
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], position - low)

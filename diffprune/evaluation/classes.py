"""Which classes a generator makes, told by the labelled images nearest to each generated one."""

from __future__ import annotations

from typing import Any

import torch

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features
from diffprune.evaluation.neighbours import nearest


def class_balance(
    samples: torch.Tensor,
    reference: torch.Tensor,
    reference_labels: torch.Tensor,
    *,
    sample_labels: torch.Tensor | None = None,
    k: int = 5,
) -> dict[str, Any]:
    """The classes of generated images [N, D] by a k-NN vote among labelled reference images [M, D], labels [M] int64.

    Returns, with classes as text in ascending order: ``shares`` (of each class among the samples),
    ``reference_shares``, ``kl_uniform`` and ``kl_reference`` (KL divergence in nats of the samples' shares from equal
    shares over the reference's classes, and from the reference's shares; 0 is balanced), and
    ``reference_accuracy``: how often the vote is right on the reference itself, each image left out in turn, which
    says how far the other numbers can be trusted. With ``sample_labels`` [N] int64 (the class asked for), also
    ``label_agreement``: the share of samples whose voted class is the one asked for; else null.
    Raises InputError for other shapes or NaN.
    """
    check_features(1, samples=samples)
    check_features(2, reference=reference)
    if reference_labels.shape != reference.shape[:1]:
        raise InputError(f"reference_labels: expected [{len(reference)}], got {tuple(reference_labels.shape)}")
    if sample_labels is not None and sample_labels.shape != samples.shape[:1]:
        raise InputError(f"sample_labels: expected [{len(samples)}], got {tuple(sample_labels.shape)}")
    predicted = knn_classes(samples, reference, reference_labels, k=k)
    voted = knn_classes(reference, reference, reference_labels, k=k, exclude_self=True)
    classes, counts = reference_labels.unique(return_counts=True)
    found = (predicted[:, None] == classes).sum(dim=0)
    shares, reference_shares = found.double() / len(samples), counts.double() / len(reference)
    agreement = None if sample_labels is None else float((predicted == sample_labels).double().mean())
    return {
        "k": k,
        "shares": _by_class(classes, shares),
        "reference_shares": _by_class(classes, reference_shares),
        "kl_uniform": _kl(shares, torch.full_like(shares, 1 / len(classes))),
        "kl_reference": _kl(shares, reference_shares),
        "reference_accuracy": float((voted == reference_labels).double().mean()),
        "label_agreement": agreement,
    }


def knn_classes(
    queries: torch.Tensor,
    points: torch.Tensor,
    labels: torch.Tensor,
    *,
    k: int = 5,
    exclude_self: bool = False,
) -> torch.Tensor:
    """The class [N] int64 of each query [N, D]: the majority among its ``k`` nearest points [M, D] (or all, if fewer).

    Tied classes: the one with the nearest member. ``exclude_self``: the queries are the points, each left out of its
    own vote.
    """
    if k < 1:
        raise InputError(f"knn_classes: expected k >= 1, got {k}")
    k = min(k, len(points) - exclude_self)
    _, neighbours = nearest(queries, points, k, exclude_self=exclude_self)
    votes = labels[neighbours]  # [N, k], nearest first
    support = (votes[:, :, None] == votes[:, None, :]).sum(dim=2)
    winner = support.argmax(dim=1)  # the first of the largest: the nearest of the tied
    return votes.gather(1, winner[:, None])[:, 0]


def _kl(p: torch.Tensor, q: torch.Tensor) -> float:
    """Σ p·ln(p/q) in nats, with 0·ln 0 = 0."""
    return max(0.0, float(torch.special.xlogy(p, p / q).sum()))


def _by_class(classes: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    return {str(label): value for label, value in zip(classes.tolist(), values.tolist(), strict=True)}

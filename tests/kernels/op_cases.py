"""Small valid arguments of every public op, by the names of its tensors' dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffprune import kernels

Shapes = dict[str, str]

TENSORS: dict[str, Shapes] = {
    "adaln_modulate": {"x": "B T D", "shift": "B D", "scale": "B D"},
    "attention": {"query": "B H T D", "key": "B H T D", "value": "B H T D"},
    "flow_interpolate": {"x1": "B C D", "t": "B", "hashes": "B"},
    "flow_matching_loss": {"velocity": "B C D", "x1": "B C D", "hashes": "B"},
    "flow_matching_loss_grad": {"velocity": "B C D", "x1": "B C D", "hashes": "B", "weight": "B"},
    "gated_residual": {"residual": "B T D", "branch": "B T D", "gate": "B D"},
    "gated_residual_adaln": {"residual": "B T D", "branch": "B T D", "gate": "B D", "shift": "B D", "scale": "B D"},
    "kmeans_assign": {"points": "N D", "centroids": "K D"},
    "kmeans_update": {"points": "N D", "assignment": "N", "weights": "N"},
    "kmeans_update_delta": {
        "points": "N D",
        "old_assignment": "N",
        "new_assignment": "N",
        "sums": "K D",
        "counts": "K",
    },
    "knn_radius": {"points": "N D"},
    "linear_grad_dot": {"input": "B T I", "grad_output": "B T O", "direction": "O I", "bias_direction": "O"},
    "linear_grad_sqnorm": {"input": "B T I", "grad_output": "B T O"},
    "linear_grad_sqnorm_dot": {"input": "B T I", "grad_output": "B T O", "direction": "O I", "bias_direction": "O"},
    "pairwise_topk": {"queries": "M D", "points": "N D"},
}
"""Op -> tensor -> its dimensions."""

OTHERS: dict[str, dict[str, Any]] = {
    "flow_interpolate": {"seed": 3, "draw": 1},
    "flow_matching_loss": {"seed": 3, "draw": 1},
    "flow_matching_loss_grad": {"seed": 3, "draw": 1},
    "kmeans_update": {"k": 3},
    "knn_radius": {"k": 2},
    "linear_grad_sqnorm": {"bias": True},
    "pairwise_topk": {"k": 2},
}

SIZES = {"B": 3, "C": 2, "D": 6, "H": 2, "I": 7, "K": 3, "M": 4, "N": 9, "O": 4, "T": 5}

DTYPES = {"hashes": torch.int64, "counts": torch.int64, "sums": torch.float64}
DTYPES |= dict.fromkeys(("assignment", "old_assignment", "new_assignment"), torch.int32)
"""Tensors that are not of the points' dtype."""

OPS = tuple(TENSORS)
PAIRS = tuple((op, name) for op, shapes in TENSORS.items() for name in shapes)
"""Every tensor of every op."""


def arguments(op: str, **sizes: int) -> dict[str, Any]:
    """Valid arguments, with other sizes than the usual for some dimensions."""
    tensors = {}
    for seed, (name, shape) in enumerate(TENSORS[op].items()):
        lengths = [(SIZES | sizes)[dimension] for dimension in shape.split()]
        tensors[name] = values(lengths, DTYPES.get(name, torch.float32), seed)
    return tensors | OTHERS.get(op, {})


def values(lengths: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(lengths, generator=generator, dtype=dtype)
    return torch.randint(3, lengths, generator=generator, dtype=dtype)


def run(op: str, given: dict[str, Any]) -> tuple[Any, ...]:
    """The public op; its results as a tuple."""
    found = getattr(kernels, op)(**given)
    return found if isinstance(found, tuple) else (found,)

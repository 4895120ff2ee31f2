"""What every metric asks of its feature tensors."""

from __future__ import annotations

import torch

from diffprune.errors import InputError


def check_features(least: int, **features: torch.Tensor) -> None:
    """Raise InputError unless each tensor is a finite float [N, D] with N >= ``least``, all with the same D."""
    widths = {}
    for name, x in features.items():
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
            raise InputError(f"{name}: expected a floating-point tensor [N, D], got {x.dtype} {tuple(x.shape)}")
        if x.shape[0] < least:
            raise InputError(f"{name}: expected at least {least} rows, got {x.shape[0]}")
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            raise InputError(f"{name}: row {int(finite.int().argmin())} has NaN or infinite values")
        widths[name] = x.shape[1]
    if len(set(widths.values())) > 1:
        raise InputError(f"expected features of one dimension, got {widths}")

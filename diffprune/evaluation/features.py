"""What every metric asks of its feature tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kernels.magnitudes import largest_magnitude


def check_features(least: int, *, power: int = 2, **features: Any) -> None:
    """Raise InputError unless each is a tensor, a finite float [N, D] with N >= ``least``, all with the same D.

    And unless float64 has what the metric computes, which grows as that power of the features: with room for sums over
    dimensions and for small differences. No features but those of float64 can be too large or too small for it.
    """
    widths = {}
    for name, x in features.items():
        expect_tensor(name, x)
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
    if any(x.dtype == torch.float64 for x in features.values()):
        smallest, largest, found = 2.0 ** (-880 / power), 2.0 ** (980 / power), largest_magnitude(*features.values())
        if found and not smallest <= found <= largest:
            raise InputError(
                f"{' and '.join(features)}: expected a largest absolute value from {smallest:.0e} to {largest:.0e}, "
                f"whose power of {power} float64 has, got {found:.3g}; multiply by a power of two"
            )


def expect_tensor(name: str, features: Any) -> None:
    """InputError for another kind of array."""
    if not isinstance(features, Tensor):
        kind = type(features).__name__
        raise InputError(f"{name}: expected a torch tensor [N, D], got {kind}; torch.as_tensor makes one of an array")

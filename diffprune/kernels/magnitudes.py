"""How large values are, and float64 values that are too large or too small to be squared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST, SMALLEST = 2.0**480, 2.0**-300
"""If the largest of some float64 values lies between them, sums of squares of their differences do not overflow, and
those that vanish are under 2^-200 of it, squared."""


def largest_magnitude(*tensors: Tensor) -> float:
    """The largest absolute value; NaN and infinities do not count. Reads the values: not for fake tensors."""
    return max((_largest(tensor) for tensor in tensors if tensor.numel()), default=0.0)


def squaring_shift(*tensors: Tensor) -> int:
    """0 if float64 can square the values, else n such that it can square 2^n times them."""
    largest = largest_magnitude(*tensors)
    if largest == 0 or SMALLEST <= largest < LARGEST:
        return 0
    room = math.frexp(LARGEST)[1] - math.frexp(largest)[1]
    return min(room, 1000)  # 2^1000 is a float64, and enough for the least one


def _largest(tensor: Tensor) -> float:
    reach = max(abs(extreme) for extreme in torch.stack(tensor.aminmax()).tolist())
    return reach if math.isfinite(reach) else _largest(tensor.nan_to_num(0.0, 0.0, 0.0))

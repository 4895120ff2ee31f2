"""Forward-mode differentiation, which the ops have no derivatives for and per-sample gradients do not follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd import forward_ad


def carries_tangent(values: Iterable[Any]) -> bool:
    """Whether one of the tensors among ``values`` has a tangent (``torch.func.jvp``, ``forward_ad.make_dual``)."""
    # Not a name of PyTorch's public interface, but the public ``unpack_dual`` takes ten times as long to say no.
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in values)

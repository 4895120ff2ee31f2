"""Definition of ``gated_residual_adaln``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.reference import adaln_modulate, gated_residual


def run(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/gated_residual_adaln.py``."""
    x = gated_residual.run(residual, branch, gate)
    return x, adaln_modulate.run(x, shift, scale)

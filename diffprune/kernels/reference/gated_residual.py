"""Definition of ``gated_residual``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """See ``kernels/gated_residual.py``."""
    dtype = compute_dtype(residual, branch)
    return (residual.to(dtype) + gate.to(dtype)[:, None] * branch.to(dtype)).to(residual.dtype).contiguous()

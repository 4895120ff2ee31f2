"""Definition of ``gated_residual_backward``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(grad_y: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to branch and gate; see ``kernels/gated_residual.py``."""
    dtype = compute_dtype(grad_y, branch)
    grad = grad_y.to(dtype)
    grad_gate = (grad * branch.to(dtype)).sum(dim=1)
    return (gate.to(dtype)[:, None] * grad).to(branch.dtype).contiguous(), grad_gate.to(gate.dtype)

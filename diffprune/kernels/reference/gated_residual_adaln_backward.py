"""Definition of ``gated_residual_adaln_backward``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.reference import adaln_modulate_backward, gated_residual_backward


def run(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to residual, branch, gate, shift and scale; see ``kernels/gated_residual_adaln.py``."""
    dtype = compute_dtype(x, branch)
    through_y, grad_shift, grad_scale = adaln_modulate_backward.run(grad_y.to(dtype), x.to(dtype), scale.to(dtype))
    grad = grad_x.to(dtype) + through_y
    grad_branch, grad_gate = gated_residual_backward.run(grad, branch.to(dtype), gate.to(dtype))
    rows = (tensor.to(gate.dtype) for tensor in (grad_gate, grad_shift, grad_scale))
    return grad.to(x.dtype).contiguous(), grad_branch.to(branch.dtype).contiguous(), *rows

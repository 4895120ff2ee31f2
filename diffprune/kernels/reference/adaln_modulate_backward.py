"""Definition of ``adaln_modulate_backward``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.reference.adaln_modulate import layer_norm


def run(grad_y: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, shift and scale; see ``kernels/adaln_modulate.py``."""
    dtype = compute_dtype(x, scale)
    grad = grad_y.to(dtype)
    normalized, inverse_std = layer_norm(x.to(dtype))
    h = grad * (1 + scale.to(dtype)[:, None])
    along = (h * normalized).mean(dim=2, keepdim=True)
    grad_x = (h - h.mean(dim=2, keepdim=True) - normalized * along) * inverse_std
    grad_scale = (grad * normalized).sum(dim=1)
    return grad_x.to(x.dtype).contiguous(), grad.sum(dim=1).to(scale.dtype), grad_scale.to(scale.dtype)

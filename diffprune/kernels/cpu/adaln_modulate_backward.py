"""``adaln_modulate_backward`` with PyTorch's backward of LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.cpu import refuse_device


def refuse(grad_y: Tensor, x: Tensor, scale: Tensor) -> str | None:
    """Only CPU tensors."""
    return refuse_device(grad_y, x, scale)


def run(grad_y: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, shift and scale; see ``kernels/adaln_modulate.py``."""
    dtype = compute_dtype(x, scale)
    width = x.shape[2:]
    wide_x, grad = x.to(dtype).contiguous(), grad_y.to(dtype).contiguous()
    normalized, mean, inverse_std = torch.native_layer_norm(wide_x, width, None, None, EPS)
    grad_normalized = grad * (1 + scale.to(dtype))[:, None]
    grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_normalized, wide_x, width, mean, inverse_std, None, None, [True, False, False]
    )
    grad_scale = torch.linalg.vecdot(grad, normalized, dim=1)
    return grad_x.to(x.dtype), grad.sum(dim=1).to(scale.dtype), grad_scale.to(scale.dtype)

"""``adaln_modulate`` with PyTorch's LayerNorm, which passes over a token once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.cpu import refuse_device


def refuse(x: Tensor, shift: Tensor, scale: Tensor) -> str | None:
    """Only CPU tensors."""
    return refuse_device(x, shift, scale)


def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See ``kernels/adaln_modulate.py``."""
    dtype = compute_dtype(x, shift)
    normalized = F.layer_norm(x.to(dtype).contiguous(), x.shape[2:], eps=EPS)
    return torch.addcmul(shift.to(dtype)[:, None], normalized, (1 + scale.to(dtype))[:, None]).to(shift.dtype)

"""Definition of ``adaln_modulate``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.checks import compute_dtype


def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See ``kernels/adaln_modulate.py``."""
    dtype = compute_dtype(x, shift)
    normalized, _ = layer_norm(x.to(dtype))
    return (normalized * (1 + scale.to(dtype)[:, None]) + shift.to(dtype)[:, None]).to(shift.dtype).contiguous()


def layer_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised tokens [B, T, D] and 1/√(variance + EPS) [B, T, 1]."""
    centred = x - x.mean(dim=2, keepdim=True)
    inverse_std = (centred.square().mean(dim=2, keepdim=True) + EPS).rsqrt()
    return centred * inverse_std, inverse_std

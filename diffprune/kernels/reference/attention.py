"""Definition of ``attention``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/attention.py``."""
    dtype = compute_dtype(query)
    scores = query.to(dtype) @ key.to(dtype).mT / query.shape[3] ** 0.5
    out = scores.softmax(dim=3) @ value.to(dtype)
    return token_major(out.to(query.dtype)), scores.logsumexp(dim=3)


def token_major(tensor: Tensor) -> Tensor:
    """[B, H, T, d] laid out in memory as [B, T, H, d]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)

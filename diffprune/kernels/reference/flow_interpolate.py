"""Definition of ``flow_interpolate``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.philox import normal_noise


def run(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """See ``kernels/flow_interpolate.py``."""
    dtype = compute_dtype(x1, t)
    x0 = normal_noise(hashes, seed, draw, x1.shape[1:].numel()).view(x1.shape).to(dtype)
    t = t.to(dtype).view(-1, *[1] * (x1.dim() - 1))
    return ((1 - t) * x0 + t * x1.to(dtype)).to(x1.dtype).contiguous()

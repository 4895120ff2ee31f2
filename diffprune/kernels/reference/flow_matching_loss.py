"""Definition of ``flow_matching_loss``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.philox import normal_noise


def run(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """See ``kernels/flow_matching_loss.py``."""
    return velocity_error(velocity, x1, hashes, seed, draw).square().mean(dim=1)


def velocity_error(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """v − (x1 − x0), [B, n]."""
    dtype = compute_dtype(velocity, x1)
    x0 = normal_noise(hashes, seed, draw, x1.shape[1:].numel()).to(dtype)
    return velocity.to(dtype).reshape(x0.shape) - (x1.to(dtype).reshape(x0.shape) - x0)

"""Definition of ``flow_matching_loss_grad``."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.reference.flow_matching_loss import velocity_error


def run(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/flow_matching_loss.py``."""
    error = velocity_error(velocity, x1, hashes, seed, draw)
    grad = 2 / error.shape[1] * weight.to(error.dtype)[:, None] * error
    return error.square().mean(dim=1), grad.to(velocity.dtype).contiguous().view(velocity.shape)

"""``flow_matching_loss_grad``: the loss and its gradient in one pass over velocity and data."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import HALF, refuse_inputs
from diffprune.kernels.cuda.flow_matching_loss import launch


def refuse(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(velocity, x1, weight, dtypes=(*HALF, torch.float32))


def run(
    velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """See ``kernels/flow_matching_loss.py``."""
    return launch(velocity, x1, hashes, seed, draw, weight)

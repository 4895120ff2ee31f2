"""Definition of ``linear_grad_dot``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> Tensor:
    """See ``kernels/linear_grad_dot.py``."""
    dtype = compute_dtype(input, grad_output, direction)
    input, grad_output, direction = input.to(dtype), grad_output.to(dtype), direction.to(dtype)
    dot = (torch.einsum("bto,bti->boi", grad_output, input) * direction).sum(dim=(1, 2))
    return dot if bias_direction is None else dot + grad_output.sum(dim=1) @ bias_direction.to(dtype)

"""Definition of ``linear_grad_sqnorm_dot``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/linear_grad_sqnorm_dot.py``."""
    dtype = compute_dtype(input, grad_output, direction)
    input, grad_output = input.to(dtype), grad_output.to(dtype)
    gradient = torch.einsum("bto,bti->boi", grad_output, input)
    sqnorm, dot = gradient.square().sum(dim=(1, 2)), (gradient * direction.to(dtype)).sum(dim=(1, 2))
    if bias_direction is None:
        return sqnorm, dot
    bias = grad_output.sum(dim=1)
    return sqnorm + bias.square().sum(dim=1), dot + bias @ bias_direction.to(dtype)

"""Definition of ``linear_grad_sqnorm``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype


def run(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """See ``kernels/linear_grad_sqnorm.py``."""
    dtype = compute_dtype(input, grad_output)
    input, grad_output = input.to(dtype), grad_output.to(dtype)
    sqnorm = torch.einsum("bto,bti->boi", grad_output, input).square().sum(dim=(1, 2))
    return sqnorm + grad_output.sum(dim=1).square().sum(dim=1) if bias else sqnorm

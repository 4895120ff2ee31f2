"""``linear_grad_dot`` with one matrix product per block of samples, on the narrower side of the layer."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype

BLOCK = 2**23
"""Elements of one [b, T, min(I, O)] temporary, or of the samples it is made from: 32 MiB in float32."""


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> Tensor:
    """See ``kernels/linear_grad_dot.py``."""
    dtype = compute_dtype(input, grad_output, direction)
    samples, tokens, wide = input.shape
    high = grad_output.shape[2]
    direction = direction.to(dtype)
    dot = input.new_empty(samples, dtype=dtype)
    step = max(1, BLOCK // max(1, tokens * max(wide, high)))
    for start in range(0, samples, step):
        own = slice(start, start + step)
        a, g = input[own].to(dtype), grad_output[own].to(dtype)
        terms = (a @ direction.mT).mul_(g) if high <= wide else (g @ direction).mul_(a)
        total = terms.sum(dim=2).sum(dim=1, dtype=torch.float64)
        if bias_direction is not None:
            total += g.sum(dim=1).double() @ bias_direction.double()
        dot[own] = total
    return dot

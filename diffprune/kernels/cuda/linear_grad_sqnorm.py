"""``linear_grad_sqnorm`` on tensor cores: the Gram form or the direct one, neither of which stores a product."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, HALF, address, refuse_inputs, rows_of_16_bytes, where

CANCELLATION = 100
"""Gram sums whose terms are this much larger than the sum are done once more in the direct form: float32 products are
off relative to the terms, see ``kernels/cpu/linear_grad_sqnorm.py``."""


def refuse(input: Tensor, grad_output: Tensor, bias: bool) -> str | None:
    """Only CUDA tensors, both float16 or both bfloat16; with one token both float32 will do."""
    one_token = input.shape[1] == 1
    return refuse_inputs(input, grad_output, dtypes=(*HALF, torch.float32) if one_token else HALF, same=True)


def run(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """See ``kernels/linear_grad_sqnorm.py``. Products and terms in float32, their last sum in float64."""
    samples, tokens, wide = input.shape
    high = grad_output.shape[2]
    sqnorm = torch.empty(samples, dtype=torch.float32, device=input.device)
    if samples == 0 or tokens == 0:
        return sqnorm.zero_()
    dtype = DTYPES[input.dtype]
    if tokens == 1:
        a, g = input.contiguous(), grad_output.contiguous()
        with where(a) as (extension, here):
            arrays = map(address, (a, g, sqnorm))
            extension.linear_grad_sqnorm_token(here, dtype, *arrays, samples, wide, high, bias)
        return sqnorm
    a, g = rows_of_16_bytes(input), rows_of_16_bytes(grad_output)
    shape = samples, tokens, a.shape[2], g.shape[2]
    gram = takes_gram(*shape[1:])
    with where(a) as (extension, here):
        size = extension.linear_grad_sqnorm_partials(here, *shape, gram)
        partials = torch.empty(size, dtype=torch.float32, device=a.device)
        again = a.new_zeros(1 + samples, dtype=torch.int32) if gram else None
        arrays = map(address, (a, g, partials, again, sqnorm))
        extension.linear_grad_sqnorm(here, dtype, *arrays, *shape, bias, gram, CANCELLATION)
    return sqnorm


def takes_gram(tokens: int, wide: int, high: int) -> bool:
    """Whether the tiles of the Gram form are fewer multiply-adds than those of the direct form."""
    side = ceil(tokens / 128)
    gram = side * (side + 1) // 2 * 128 * 128 * (_up(wide, 64) + _up(high, 64))
    return gram <= _up(high, 128) * _up(wide, 256) * _up(tokens, 64)


def _up(size: int, step: int) -> int:
    return ceil(size / step) * step

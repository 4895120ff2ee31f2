"""``linear_grad_sqnorm`` by the form with fewer operations, a few samples at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype

BLOCK = 2**23
"""Elements of one [b, T, T] or [b, O, I] temporary: 32 MiB in float32."""

CANCELLATION = 100
"""Gram sums whose terms are this much larger than the sum are not trusted: see ``_gram``."""


def run(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """See ``kernels/linear_grad_sqnorm.py``."""
    dtype = compute_dtype(input, grad_output)
    samples, tokens, wide = input.shape
    high = grad_output.shape[2]
    gram, direct = operations(tokens, wide, high)
    form, size = (_gram, tokens * tokens) if gram < direct else (_direct, wide * high)
    sqnorm = input.new_empty(samples, dtype=dtype)
    step = max(1, BLOCK // max(1, size, tokens * (wide + high)))
    for start in range(0, samples, step):
        own = slice(start, start + step)
        sqnorm[own] = form(input[own].to(dtype), grad_output[own].to(dtype), bias)
    return sqnorm


def operations(tokens: int, wide: int, high: int) -> tuple[int, int]:
    """Multiply-adds per sample of the Gram form and of the direct one."""
    return tokens * tokens * (wide + high + 1), (tokens + 1) * wide * high


def _direct(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    sqnorm = _total((g.mT @ a).square_())
    return sqnorm + g.sum(dim=1).square().sum(dim=1, dtype=torch.float64) if bias else sqnorm


def _gram(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """Float32 errors are relative to the terms, not to their sum.

    Where tokens cancel (inputs that share a mean and gradients that sum to 0 over the tokens, as those of attention's
    keys do) the sum can be 10^6 times smaller than its terms and pure noise. The direct form adds the tokens before it
    squares and loses only the root of that.
    """
    terms = a @ a.mT
    if bias:
        terms += 1
    terms *= g @ g.mT
    sqnorm = _total(terms)
    cancelled = _total(terms.abs_()) > CANCELLATION * sqnorm
    if bool(cancelled.any()):
        sqnorm[cancelled] = torch.cat(
            [_direct(a[i : i + 1], g[i : i + 1], bias) for i in cancelled.nonzero().flatten()]
        )
    return sqnorm


def _total(terms: Tensor) -> Tensor:
    return terms.sum(dim=2).sum(dim=1, dtype=torch.float64)

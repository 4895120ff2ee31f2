"""``linear_grad_sqnorm_dot`` by one product, the samples' gradients a piece at a time; or by the other two ops."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.checks import compute_dtype
from diffprune.kernels.cpu import linear_grad_dot, linear_grad_sqnorm

BLOCK = 2**20
"""Elements of a piece, 4 MiB in float32: it is read twice, from the cache."""

TOUCHED = 32
"""Multiply-adds of a large product that take as long as to write one element of the gradients and to read it twice."""


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/linear_grad_sqnorm_dot.py``."""
    if pays(input.shape[1], input.shape[2], grad_output.shape[2]):
        return at_once(input, grad_output, direction, bias_direction)
    dtype = compute_dtype(input, grad_output, direction)
    sqnorm = linear_grad_sqnorm.run(input, grad_output, bias_direction is not None)
    return sqnorm.to(dtype), linear_grad_dot.run(input, grad_output, direction, bias_direction)


def pays(tokens: int, wide: int, high: int) -> bool:
    """Whether one product for both is faster: the dot's, as large, remains, and what the norm alone takes is saved.

    For DiT's blocks from some 100 tokens on, for layers with a narrow side from 32 on.
    """
    return min(linear_grad_sqnorm.operations(tokens, wide, high)) > TOUCHED * wide * high


def at_once(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both from Gᵀ·A."""
    dtype = compute_dtype(input, grad_output, direction)
    samples, _, wide = input.shape
    direction = direction.to(dtype)
    sqnorm, dot = (input.new_zeros(samples, dtype=torch.float64) for _ in range(2))
    rows = max(1, min(grad_output.shape[2], BLOCK // max(1, wide)))
    step = max(1, BLOCK // max(1, rows * wide))
    for start in range(0, samples, step):
        own = slice(start, start + step)
        a = input[own].to(dtype)
        for first in range(0, grad_output.shape[2], rows):
            part = slice(first, first + rows)
            g = grad_output[own, :, part].to(dtype)
            gradient = g.mT @ a
            sqnorm[own] += torch.linalg.vecdot(gradient, gradient).sum(dim=1, dtype=torch.float64)
            dot[own] += torch.linalg.vecdot(gradient, direction[part]).sum(dim=1, dtype=torch.float64)
            if bias_direction is not None:
                bias = g.sum(dim=1).double()
                sqnorm[own] += bias.square().sum(dim=1)
                dot[own] += bias @ bias_direction[part].double()
    return sqnorm.to(dtype), dot.to(dtype)

"""``linear_grad_sqnorm_dot`` by the other two ops: no kernel makes both at once yet."""

from __future__ import annotations

from torch import Tensor

from diffprune.kernels.cuda import linear_grad_dot, linear_grad_sqnorm


def refuse(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> str | None:
    """What ``linear_grad_dot`` refuses."""
    return linear_grad_dot.refuse(input, grad_output, direction, bias_direction)


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/linear_grad_sqnorm_dot.py``."""
    sqnorm = linear_grad_sqnorm.run(input, grad_output, bias_direction is not None)
    return sqnorm, linear_grad_dot.run(input, grad_output, direction, bias_direction)

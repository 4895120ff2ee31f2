"""What is put into autograd's graph to hear of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffprune.errors import InputError


class Keep(torch.autograd.Function):
    """Saves tensors as autograd does, so that a checkpointed block makes them again instead of holding them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class Start(torch.autograd.Function):
    """A graph that starts at `compute()`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        output = compute()
        return torch.ops.aten._unsafe_view(output, output.shape) if output._is_view() else output  # for in-place users

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def node_of(output: Tensor) -> tuple[torch.autograd.graph.Node, Callable[[Tensor], Tensor]]:
    """Where the gradient of `output` comes through, and which part of it is `output`'s."""
    base = output._base
    if base is None or base.grad_fn is None or "CopySlices" not in base.grad_fn.name():
        return output.grad_fn, lambda gradient: gradient
    if not base.is_contiguous():
        raise InputError(f"a view {tuple(output.shape)} of a tensor that is not contiguous is changed in place")
    place = output.shape, output.stride(), output.storage_offset() - base.storage_offset()
    return base.grad_fn, lambda gradient: gradient.contiguous().as_strided(*place)  # it may be read through the base


def forget_gradient(tensor: Tensor) -> None:
    tensor.grad = None

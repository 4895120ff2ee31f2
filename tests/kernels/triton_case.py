"""How tests run a Triton kernel so that what it must not read or leave unwritten shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A GPU if there is one; else the interpreter runs the kernels on CPU tensors."""

BAND = 2**17
"""Elements before and after each tensor: more than any tile of the tests reaches over an edge."""


def launch(op: Callable[..., Any], *args: Any, impl: str = "triton", **options: Any) -> Any:
    """``op(*args, impl="triton")`` on ``DEVICE``, the answer on the CPU.

    Inputs lie between bands of NaN (integers: their largest value), and so does all that the launcher allocates with
    ``torch.empty``, which is full of them as well. Fails if a band or an input has changed.
    """
    inputs = [_banded(arg.shape, arg.dtype, arg) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    before = [None if whole is None else whole.clone() for _, whole in inputs]
    with _poisoned_memory() as allocated:
        found = op(*(arg for arg, _ in inputs), impl=impl, **options)
        found = tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()
    for (_, whole), old in zip(inputs, before, strict=True):
        assert whole is None or _same(whole, old), "wrote to an input, or next to it"
    for whole in allocated:
        band = torch.full_like(whole[:BAND], _poison(whole.dtype))
        assert _same(whole[:BAND], band) and _same(whole[-BAND:], band), "wrote next to an output"
    return found


@contextmanager
def _poisoned_memory() -> Iterator[list[Tensor]]:
    allocated: list[Tensor] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        tensor, whole = _banded(shape, dtype or torch.get_default_dtype())
        assert torch.device(device or "cpu").type == DEVICE.type
        allocated.append(whole)
        return tensor

    with patch.object(torch, "empty", empty):
        yield allocated


def _banded(shape: torch.Size, dtype: torch.dtype, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A tensor of ``shape``, with the strides of ``value`` if given, and the memory it lies in with its bands."""
    strides = _contiguous(shape) if value is None else value.stride()
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if shape.numel() else 0
    whole = torch.full((2 * BAND + extent,), _poison(dtype), dtype=dtype, device=DEVICE)
    tensor = whole.as_strided(shape, strides, BAND)
    if value is not None:
        tensor.copy_(value)
    return tensor, whole


def _contiguous(shape: torch.Size) -> list[int]:
    return [max(1, shape[i + 1 :].numel()) for i in range(len(shape))]


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

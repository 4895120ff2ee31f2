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


Place = Callable[..., tuple[Tensor, Tensor]]
"""(shape, dtype, value or None) -> a tensor, full of poison or with the strides and the values of ``value``; and the
poisoned memory, a one-dimensional tensor, in which it begins at its storage offset."""


def launch(op: Callable[..., Any], *args: Any, impl: str = "triton", place: Place | None = None, **options: Any) -> Any:
    """``op(*args, impl="triton")`` on ``DEVICE``, the answer on the CPU.

    Inputs lie between bands of NaN (integers: their largest value), and so does all that the launcher allocates with
    ``torch.empty``, which is full of them as well, ``new_zeros`` and ``new_full``. Fails if a band or an input has
    changed. ``place``: how memory is found, by default ``banded``.
    """
    place = place or banded
    inputs = [place(arg.shape, arg.dtype, arg) if isinstance(arg, Tensor) else (arg, None) for arg in args]
    before = [None if whole is None else whole.clone() for _, whole in inputs]
    with _poisoned_memory(place) as allocated:
        found = op(*(arg for arg, _ in inputs), impl=impl, **options)
        found = tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()
    for (_, whole), old in zip(inputs, before, strict=True):
        assert whole is None or _same(whole, old), "wrote to an input, or next to it"
    for tensor, whole in allocated:
        begin = tensor.storage_offset()
        for band in (whole[:begin], whole[begin + extent(tensor.shape, tensor.stride()) :]):
            assert _same(band, torch.full_like(band, poison(whole.dtype))), "wrote next to an output"
    return found


@contextmanager
def _poisoned_memory(place: Place) -> Iterator[list[tuple[Tensor, Tensor]]]:
    allocated: list[tuple[Tensor, Tensor]] = []

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        tensor, whole = place(shape, dtype or torch.get_default_dtype())
        assert torch.device(device or "cpu").type == DEVICE.type
        allocated.append((tensor, whole))
        return tensor

    def new_zeros(like: Tensor, *size: Any, dtype: torch.dtype | None = None) -> Tensor:
        return empty(*size, dtype=dtype or like.dtype, device=like.device).zero_()

    def new_full(like: Tensor, size: Any, value: float) -> Tensor:
        return empty(size, dtype=like.dtype, device=like.device).fill_(value)

    with patch.multiple(torch, empty=empty), patch.multiple(Tensor, new_zeros=new_zeros, new_full=new_full):
        yield allocated


def banded(shape: torch.Size, dtype: torch.dtype, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A tensor between two bands; see ``Place``."""
    length = 2 * BAND + extent(shape, strides_of(shape, value))
    whole = torch.full((length,), poison(dtype), dtype=dtype, device=DEVICE)
    return lay(whole, BAND, shape, value), whole


def lay(whole: Tensor, offset: int, shape: torch.Size, value: Tensor | None) -> Tensor:
    """The tensor that begins at element ``offset`` of ``whole``."""
    tensor = whole.as_strided(shape, strides_of(shape, value), offset)
    return tensor if value is None else tensor.copy_(value)


def extent(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Elements from the first of a tensor to its last in memory."""
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if shape.numel() else 0


def strides_of(shape: torch.Size, value: Tensor | None) -> tuple[int, ...]:
    """Those of ``value``, or of a contiguous tensor."""
    if value is not None:
        return value.stride()
    return tuple(max(1, shape[i + 1 :].numel()) for i in range(len(shape)))


def poison(dtype: torch.dtype) -> float | int | bool:
    """What shows where it is read."""
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))

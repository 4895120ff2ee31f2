"""How tests see that a kernel in Triton's interpreter reads or writes only elements of its arguments.

Reading past an end changes no result where what was read is not used, and is an illegal access on a GPU all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton_case
from torch import Tensor
from triton_case import DEVICE


def launch(op: Any, *args: Any, **options: Any) -> Any:
    """``triton_case.launch`` within bounds."""
    with within_bounds():
        return triton_case.launch(op, *args, **options)


@contextmanager
def within_bounds() -> Iterator[None]:
    """AssertionError where a kernel touches an address that is no element of a tensor it was launched with.

    And where it is launched for nothing, on an empty grid.
    """
    if DEVICE.type == "cuda":  # not interpreted: compute-sanitizer is the tool there
        yield
        return
    from triton.runtime import interpreter

    tensors: list[Tensor] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    init, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def launched(self: Any, args: Any, kwargs: Any) -> Any:
        assert all(size > 0 for size in self.grid), "an empty grid was launched"
        values = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        tensors[:] = [value for value in values if isinstance(value, torch.Tensor)]
        return init(self, args, kwargs)

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _check("reads", tensors, ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _check("writes", tensors, ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest, **options)

    with (
        patch.object(executor, "_init_args_hst", launched),
        patch.object(builder, "create_masked_load", checked_load),
        patch.object(builder, "create_masked_store", checked_store),
    ):
        yield


def _check(what: str, tensors: list[Tensor], addresses: np.ndarray, mask: np.ndarray | memoryview) -> None:
    mask = np.asarray(mask, dtype=bool)  # of a descriptor in Triton 3.6 it is a buffer
    touched = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[mask]
    lost = touched.astype(np.int64)
    for tensor in tensors:
        lost = lost[~_elements(tensor, lost)]
    assert lost.size == 0, f"{what} {lost.size} elements that are in none of its arguments"


def _elements(tensor: Tensor, addresses: np.ndarray) -> np.ndarray:
    """Which of the addresses are those of an element."""
    rest = addresses - tensor.data_ptr()
    inside = (rest >= 0) & (tensor.numel() > 0)
    size = tensor.element_size()
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride > 0 and length > 1:
            inside &= rest // (stride * size) < length
            rest = rest % (stride * size)
    return inside & (rest == 0)

"""Checks of an op's inputs; messages say what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expect(name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """ValueError unless ``tensor`` is dense, has the rank of ``shape`` (as in "N, D") and one of ``dtypes``."""
    expect_dense(name, tensor)
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"expected {name} [{shape}], got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"expected {name} of dtype {expected}, got {tensor.dtype}")


def expect_dense(name: str, tensor: Tensor) -> None:
    """ValueError for a sparse tensor."""
    if tensor.layout != torch.strided:
        raise ValueError(f"expected {name} as a dense tensor, got {tensor.layout}")


def expect_equal(what: str, names: str, *values: object) -> None:
    """ValueError unless all ``values``, which are the ``what`` of the tensors ``names``, are equal."""
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"expected {names} of equal {what}, got {' and '.join(map(str, values))}")


def expect_finite(name: str, tensor: Tensor) -> None:
    """ValueError if ``tensor`` holds a NaN or an infinity. Reads the values: not for fake tensors."""
    if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):  # isfinite() needs copies
        rows = (~tensor.isfinite()).flatten(1).any(dim=1).nonzero().flatten()
        raise ValueError(
            f"expected finite {name}, got NaN or infinity in {len(rows)} rows, the first is {int(rows[0])}"
        )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32: half precision is upcast."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32

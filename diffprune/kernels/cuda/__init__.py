"""CUDA C++: each op calls functions of the extension ``diffprune._C`` (sources and contract: ``csrc/ops.h``).

The extension knows pointers, sizes and streams, not torch. So this side checks dtypes and devices, allocates outputs
and temporaries on torch's current stream, and lays inputs out as the kernels read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}
"""The codes of csrc/ops.h."""

HALF = (torch.float16, torch.bfloat16)

path = 0
"""Which matrix kernels: 80 or 90 for those of that generation, 0 for the best that the device has."""


def unavailable() -> str | None:
    """Why no CUDA implementation can run on this machine, or None."""
    if find_spec("diffprune._C") is None:
        return "needs the extension diffprune._C: install from source where nvcc is, or run python csrc/cuda_build.py"
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    return None if oldest >= (8, 0) else f"needs compute capability 8.0 or newer, got {oldest[0]}.{oldest[1]}"


def extension() -> ModuleType:
    """The module ``diffprune._C``."""
    return import_module("diffprune._C")


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels can read this tensor."""
    return tensor.device.type == "cuda"


def refuse_inputs(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...], same: bool = False) -> str | None:
    """The reason to refuse, if a tensor is not on a GPU, or of another dtype; ``same``: or if their dtypes differ."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if not on_gpu(tensor):
            return f"needs CUDA tensors, got {tensor.device}"
        if tensor.dtype not in dtypes:
            return f"needs {' or '.join(map(_name, dtypes))}, got {_name(tensor.dtype)}"
    if same and len({tensor.dtype for tensor in given}) > 1:
        return f"needs inputs of one dtype, got {' and '.join(_name(tensor.dtype) for tensor in given)}"
    return None


@contextmanager
def where(tensor: Tensor) -> Iterator[tuple[ModuleType, Any]]:
    """The extension, and its ``Where`` for the device of ``tensor`` and torch's current stream there."""
    module = extension()
    with current_stream(tensor.device) as stream:
        yield module, module.Where(tensor.device.index or 0, stream, path)


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """Torch's current stream of ``device``, which is the current device meanwhile."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def address(tensor: Tensor | None) -> int:
    """Pointer to the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of_16_bytes(tensor: Tensor) -> Tensor:
    """The tensor as the matrix kernels read it: contiguous, rows a multiple of 16 bytes, from an aligned address.

    The tensor itself where it is so; else a copy, its rows filled up with zeros.
    """
    step = 16 // tensor.element_size()
    missing = -tensor.shape[-1] % step or (step if tensor.shape[-1] == 0 else 0)
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing)).contiguous()
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

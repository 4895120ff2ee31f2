"""Lets ops run with ``impl="cuda"``: on a GPU if there is one, else their sources on the CPU, see tests/emulator."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import emulator
import pytest
import torch
import triton_case
from torch import Tensor

from diffprune.kernels import cuda, dispatch, flow_matching_loss  # noqa: F401 (defines its ops)

OPS = (
    "kmeans_assign",
    "kmeans_update",
    "linear_grad_dot",
    "linear_grad_sqnorm",
    "linear_grad_sqnorm_dot",
    "flow_matching_loss",
    "flow_matching_loss_grad",
)
GPU = torch.cuda.is_available()
LIBC = ctypes.CDLL(None)
BAND = 2**12
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9


@pytest.fixture
def cuda_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: fails unless the extension was built. Elsewhere the emulated one takes its place, for CPU tensors."""
    if GPU:
        assert cuda.unavailable() is None, cuda.unavailable()
        return
    if reason := emulator.unavailable():
        pytest.skip(f"no GPU, and the emulator {reason}")
    monkeypatch.setattr(cuda, "extension", emulator.load)
    monkeypatch.setattr(cuda, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "current_stream", _no_stream)
    emulator.seed(0)
    for op in OPS:
        module = import_module(f"diffprune.kernels.cuda.{op}")
        monkeypatch.setitem(dispatch._ops[op].implementations, "cuda", module)


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda_ops: None) -> int:
    """Each generation of matrix kernels that can run here, in turn."""
    if request.param == 90 and GPU and not HOPPER:
        pytest.skip("the kernels for sm_90a need a Hopper GPU")
    monkeypatch.setattr(cuda, "path", request.param)
    return request.param


@contextmanager
def _no_stream(device: torch.device) -> Iterator[int]:
    yield 0


def launch(op: Any, *args: Any, misaligned: bool = False, **options: Any) -> Any:
    """``triton_case.launch``. Off a GPU each tensor ends where memory does: what a kernel touches beyond is an error.

    On a GPU compute-sanitizer is the tool for that. ``misaligned``: inputs begin where views may, between multiples of
    16 bytes.
    """
    place = _misaligned if misaligned else None if GPU else _fenced
    return triton_case.launch(op, *args, impl="cuda", place=place, **options)


def _misaligned(shape: torch.Size, dtype: torch.dtype, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``triton_case.Place``: inputs begin one element after a multiple of 16 bytes; what torch allocates does not."""
    length = 2 * BAND + 1 + triton_case.extent(shape, triton_case.strides_of(shape, value))
    whole = torch.full((length,), triton_case.poison(dtype), dtype=dtype, device=triton_case.DEVICE)
    return triton_case.lay(whole, BAND + (value is not None), shape, value), whole


def _fenced(shape: torch.Size, dtype: torch.dtype, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ``triton_case.Place``: after a band, and right before a page that nobody may touch."""
    length = BAND + triton_case.extent(shape, triton_case.strides_of(shape, value))
    size = length * dtype.itemsize
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    assert LIBC.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    whole = torch.frombuffer(memory, dtype=dtype, count=length, offset=pages - size)
    whole.fill_(triton_case.poison(dtype))
    return triton_case.lay(whole, BAND, shape, value), whole

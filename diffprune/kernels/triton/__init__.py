"""Triton kernels: one file per op, with its kernels, the launcher `run` and what says how the launcher tiles.

How to write one (`linear_grad_dot.py` is the pattern):

- ``run(*args)`` is the launcher. It is called with what the op was called with, already checked by the op. Outputs and
  temporaries come from ``torch.empty(..., device=...)`` called as that name (tests replace it with memory full of NaN
  between guard bands); it never copies to the host, so it also runs on meta tensors, and launches nothing on an empty
  grid.
- ``refuse(*args)`` is the reason not to take these arguments, or None: start with ``refuse_inputs``.
- ``config(...)`` is a plain function of sizes, element widths and ``gpu(tensor)`` that returns the tile and the
  keyword arguments of the launch. No ``triton.autotune``: it needs a driver and fails in the interpreter.
- ``aot_cases()`` yields ``Case(label, args)``: arguments of ``run`` at sizes that matter, as ``meta`` tensors. The
  launcher itself is run on them, for each GPU, and what it launches is compiled: a case never repeats a config. What
  the compiler made of it, ``python -m diffprune.kernels.aot`` prints and tests/kernels/test_triton_aot.py judges.
- In a kernel: a pointer's comment gives the tensor's shape; every axis is masked; row offsets are int64 before they
  are multiplied by a stride; sums are float32; no float atomics, so that results repeat bit for bit; float32 products
  say ``input_precision="ieee"``. Helpers that a kernel calls are ``triton.jit`` functions.
- Tests run the op with ``impl="triton"`` through ``launch`` of tests/kernels/triton_case.py: on a GPU if there is one,
  else in Triton's interpreter (``TRITON_INTERPRET=1``, read when a kernel is decorated), in float32 or float16:
  products of bfloat16 are wrong there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Gpu:
    """What a launch configuration may depend on besides the sizes."""

    capability: int
    """Compute capability, major and minor digit: 80, 86, 90, 100."""
    shared: int
    """Bytes of shared memory that one program may have."""
    processors: int
    """Multiprocessors."""


TARGETS = {80: Gpu(80, 163 * 1024, 108), 90: Gpu(90, 227 * 1024, 132), 100: Gpu(100, 227 * 1024, 148)}
"""A100, H100, B200: what kernels are compiled for ahead of time."""


@dataclass(frozen=True)
class Case:
    """Arguments of a launcher, for compilation ahead of time."""

    label: str
    args: tuple
    """As for ``run``; tensors on the device "meta"."""
    quick: bool = False
    """Compile it in the default test run too: one or two per op."""


def unavailable() -> str | None:
    """Why no Triton implementation can run on this machine, or None."""
    if find_spec("triton") is None:
        return "needs the package triton"
    if not torch.cuda.is_available() and not emulated():
        return "needs a CUDA device (or TRITON_INTERPRET=1, to run the kernels in Triton's interpreter)"
    return None


def emulated() -> bool:
    """Whether kernels run in Triton's interpreter: thousands of times slower, so ``impl="auto"`` never takes it."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse_inputs(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = DTYPES) -> str | None:
    """The reason to refuse, if a tensor is where these kernels do not run or of a dtype that they do not read."""
    for tensor in (tensor for tensor in tensors if tensor is not None):
        if tensor.device.type != "cuda" and not (emulated() and tensor.device.type == "cpu"):
            return f"needs CUDA tensors, got {tensor.device}"
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"needs {names}, got {str(tensor.dtype).removeprefix('torch.')}"
    return None


def gpu(tensor: Tensor) -> Gpu:
    """The GPU that a kernel on ``tensor`` is compiled for; off a GPU the one of ``assume``, at first an H100."""
    return _properties(tensor.device) if tensor.device.type == "cuda" else _assumed


@contextmanager
def assume(target: Gpu) -> Iterator[None]:
    """Launchers pick configurations for ``target`` where tensors are not on a GPU."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


_assumed = TARGETS[90]


@cache
def _properties(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.major * 10 + found.minor, found.shared_memory_per_block_optin, found.multi_processor_count)

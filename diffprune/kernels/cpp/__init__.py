"""Calls of the C++ extension ``diffprune._cpu`` (``csrc/cpu``): what PyTorch's own operators cannot do at speed."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
"""``Type`` of csrc/cpu/kmeans_assign.h."""


def unavailable() -> str | None:
    """Why none of its modules can run on this machine."""
    if find_spec("diffprune._cpu") is None:
        return "the extension diffprune._cpu was not built: install from source where there is a C++ compiler"
    try:
        fits = hasattr(extension(), "CentroidSearch")
    except ImportError as error:
        return f"the extension diffprune._cpu cannot be loaded ({error}): install again"
    if not fits:
        return "the extension diffprune._cpu is another version's: install again"
    if instruction_set() == "portable":
        return "needs a processor with AVX2, or AVX-512 and VNNI"
    return None


@cache
def extension() -> ModuleType:
    """The compiled module."""
    return import_module("diffprune._cpu")


def instruction_set() -> str:
    """The fastest that this processor has and that gave the right products when it was tried: "amx", "avx512vnni",
    "avx2" or "portable"."""
    return extension().variants()[0]


def as_rows(points: Tensor) -> Tensor:
    """``points`` [N, D] itself where each row lies in one piece and after the row before, else a copy."""
    return points if points.stride(1) == 1 and points.stride(0) >= points.shape[1] else points.contiguous()

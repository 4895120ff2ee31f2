"""Blocked forms in plain PyTorch: bounded memory, and fewer operations than the definition.

They are made for the CPU. Those without a ``refuse`` are right on a GPU too, and are what "auto" takes there until a
kernel is confirmed.
"""

from __future__ import annotations

from torch import Tensor


def unavailable() -> str | None:
    """Why no CPU implementation can run on this machine: never."""
    return None


def refuse_device(*tensors: Tensor | None) -> str | None:
    """The reason to refuse, if a tensor is not on the CPU."""
    elsewhere = [str(tensor.device) for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    return f"needs CPU tensors, got {elsewhere[0]}" if elsewhere else None

"""Blocked forms for the CPU: bounded memory, and fewer operations than the definition."""

from __future__ import annotations

from torch import Tensor


def unavailable() -> str | None:
    """Why no CPU implementation can run on this machine: never."""
    return None


def refuse_device(*tensors: Tensor | None) -> str | None:
    """The reason to refuse, if a tensor is not on the CPU."""
    elsewhere = [str(tensor.device) for tensor in tensors if tensor is not None and tensor.device.type != "cpu"]
    return f"needs CPU tensors, got {elsewhere[0]}" if elsewhere else None

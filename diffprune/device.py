"""Which device a stage runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffprune.errors import InputError


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; ``auto`` is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: this PyTorch ({torch.__version__}) sees no CUDA GPU; use --device cpu")
    return device


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in matrix products and convolutions: it would leave 3 digits of a latent or score."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)

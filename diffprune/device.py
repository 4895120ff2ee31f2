"""Which device a stage runs on."""

from __future__ import annotations

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

"""The linear layers of DiT-S/2 and DiT-XL/2, for compilation ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTHS = {"S/2": 384, "XL/2": 1152}

SAMPLES = 64


def layers(tokens: int = 256) -> dict[str, tuple[int, int, int]]:
    """Name -> tokens, inputs, outputs; latents of 4 channels in patches of 2 × 2, whose variance is predicted too."""
    found = {}
    for name, width in WIDTHS.items():
        sizes = {
            "qkv": (width, 3 * width),
            "proj": (width, width),
            "fc1": (width, 4 * width),
            "fc2": (4 * width, width),
        }
        sizes |= {"patch": (16, width), "final": (width, 32)}
        found |= {f"{name} {layer}": (tokens, *size) for layer, size in sizes.items()}
        found[f"{name} adaLN"] = (1, width, 6 * width)
    return found


def tensors(sizes: tuple[int, int, int], *dtypes: torch.dtype) -> Iterator[Tensor]:
    """On the device "meta": input [B, T, I], gradient [B, T, O] and direction [O, I], as far as dtypes are given."""
    tokens, wide, high = sizes
    shapes = (SAMPLES, tokens, wide), (SAMPLES, tokens, high), (high, wide)
    for shape, dtype in zip(shapes, dtypes, strict=False):
        yield torch.empty(shape, dtype=dtype, device="meta")


def label(name: str, *dtypes: torch.dtype) -> str:
    """``name``, and the dtypes without their prefix."""
    return " ".join([name, *(str(dtype).removeprefix("torch.") for dtype in dtypes)])

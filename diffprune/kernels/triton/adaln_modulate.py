"""``adaln_modulate`` in one pass: a program has some tokens of one sample in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.triton import Case, refuse_inputs
from diffprune.kernels.triton.tokens import config, layer_norm, load_row, places, refuse_width, rows


def refuse(x: Tensor, shift: Tensor, scale: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(x, shift, scale) or refuse_width(x.shape[2])


def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """See ``kernels/adaln_modulate.py``."""
    x, shift, scale = x.contiguous(), rows(shift), rows(scale)
    samples, tokens, features = x.shape
    y = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    sizes, options = config(tokens, features)
    grid = samples * triton.cdiv(tokens, sizes["ROWS"])
    if grid > 0:
        strides = shift.stride(0), scale.stride(0)
        _kernel[(grid,)](x, shift, scale, y, tokens, features, *strides, EPS=EPS, **sizes, **options)
    return y


def aot_cases() -> Iterator[Case]:
    """Tokens of DiT-S/2 and DiT-XL/2, in training under autocast and in half precision; chunks of a modulation."""
    for name, features in (("S/2", 384), ("XL/2", 1152)):
        for dtype, half in ((torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2):
            x = torch.empty(256, 256, features, dtype=dtype, device="meta")
            shift, scale = torch.empty(256, 6 * features, dtype=half, device="meta").chunk(6, dim=1)[:2]
            label = f"{name} {str(dtype).removeprefix('torch.')} to {str(half).removeprefix('torch.')}"
            yield Case(label, (x, shift, scale), quick=label == "XL/2 float32 to bfloat16")


@triton.jit
def _kernel(
    x_ptr,  # [B, tokens, features]
    shift_ptr,  # [B, features]
    scale_ptr,  # [B, features]
    y_ptr,  # [B, tokens, features]
    tokens,
    features,
    shift_stride,
    scale_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // tiles
    offsets, mask = places(sample, tl.program_id(0) % tiles * ROWS, tokens, features, ROWS, WIDTH)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    shift = load_row(shift_ptr, sample, shift_stride, features, WIDTH)
    scale = load_row(scale_ptr, sample, scale_stride, features, WIDTH)
    normalized = layer_norm(x, mask, features, EPS)
    y = normalized * (1 + scale)[None, :] + shift[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)

"""``gated_residual`` in one pass."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, refuse_inputs
from diffprune.kernels.triton.tokens import config, load_row, places, refuse_width, rows


def refuse(residual: Tensor, branch: Tensor, gate: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(residual, branch, gate) or refuse_width(residual.shape[2])


def run(residual: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """See ``kernels/gated_residual.py``."""
    residual, branch, gate = residual.contiguous(), branch.contiguous(), rows(gate)
    samples, tokens, features = residual.shape
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    sizes, options = config(tokens, features)
    if y.numel() > 0:
        grid = samples * triton.cdiv(tokens, sizes["ROWS"])
        _kernel[(grid,)](residual, branch, gate, y, tokens, features, gate.stride(0), **sizes, **options)
    return y


def aot_cases() -> Iterator[Case]:
    """Tokens of DiT-S/2 and DiT-XL/2, in training under autocast and in half precision; a chunk of a modulation."""
    for name, features in (("S/2", 384), ("XL/2", 1152)):
        for dtype, half in ((torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float32,) * 2):
            residual = torch.empty(256, 256, features, dtype=dtype, device="meta")
            branch = torch.empty(256, 256, features, dtype=half, device="meta")
            gate = torch.empty(256, 6 * features, dtype=half, device="meta").chunk(6, dim=1)[2]
            label = f"{name} {str(dtype).removeprefix('torch.')} and {str(half).removeprefix('torch.')}"
            yield Case(label, (residual, branch, gate), quick=label == "XL/2 float32 and bfloat16")


@triton.jit
def _kernel(
    residual_ptr,  # [B, tokens, features]
    branch_ptr,  # [B, tokens, features]
    gate_ptr,  # [B, features]
    y_ptr,  # [B, tokens, features]
    tokens,
    features,
    gate_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // tiles
    offsets, mask = places(sample, tl.program_id(0) % tiles * ROWS, tokens, features, ROWS, WIDTH)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = load_row(gate_ptr, sample, gate_stride, features, WIDTH)
    y = residual + gate[None, :] * branch
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)

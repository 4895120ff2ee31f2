"""``gated_residual_adaln`` in one pass: a program has some tokens of one sample in registers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.triton import Case, gated_residual, refuse_inputs
from diffprune.kernels.triton.tokens import config, layer_norm, load_row, places, refuse_width, rows


def refuse(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(residual, branch) or refuse_width(residual.shape[2])


def run(residual: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/gated_residual_adaln.py``."""
    residual, branch = residual.contiguous(), branch.contiguous()
    gate, shift, scale = rows(gate), rows(shift), rows(scale)
    samples, tokens, features = residual.shape
    x = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    y = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    sizes, options = config(tokens, features)
    grid = samples * triton.cdiv(tokens, sizes["ROWS"])
    if grid > 0:
        tensors = residual, branch, gate, shift, scale, x, y
        strides = gate.stride(0), shift.stride(0), scale.stride(0)
        _kernel[(grid,)](*tensors, tokens, features, *strides, EPS=EPS, **sizes, **options)
    return x, y


def aot_cases() -> Iterator[Case]:
    """Those of ``gated_residual``, and two more chunks of the modulation."""
    for case in gated_residual.aot_cases():
        gate = case.args[2]
        shift, scale = gate.new_empty(gate.shape[0], 6 * gate.shape[1]).chunk(6, dim=1)[3:5]
        yield Case(case.label, (*case.args, shift, scale), case.quick)


@triton.jit
def _kernel(
    residual_ptr,  # [B, tokens, features]
    branch_ptr,  # [B, tokens, features]
    gate_ptr,  # [B, features]
    shift_ptr,  # [B, features]
    scale_ptr,  # [B, features]
    x_ptr,  # [B, tokens, features]
    y_ptr,  # [B, tokens, features]
    tokens,
    features,
    gate_stride,
    shift_stride,
    scale_stride,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, ROWS)
    sample = tl.program_id(0) // tiles
    offsets, mask = places(sample, tl.program_id(0) % tiles * ROWS, tokens, features, ROWS, WIDTH)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    gate = load_row(gate_ptr, sample, gate_stride, features, WIDTH)
    shift = load_row(shift_ptr, sample, shift_stride, features, WIDTH)
    scale = load_row(scale_ptr, sample, scale_stride, features, WIDTH)
    x = (residual + gate[None, :] * branch).to(x_ptr.dtype.element_ty)
    tl.store(x_ptr + offsets, x, mask=mask)
    normalized = layer_norm(x.to(tl.float32), mask, features, EPS)
    y = normalized * (1 + scale)[None, :] + shift[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)

"""``gated_residual_adaln_backward`` in one pass; a program leaves the sums over its tokens, which are added up then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.triton import Case, gated_residual_adaln, gpu, refuse_inputs
from diffprune.kernels.triton.tokens import (
    config,
    layer_norm_backward,
    load_row,
    places,
    refuse_width,
    rows,
    share,
)


def refuse(grad_x: Tensor, grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(x, branch) or refuse_width(x.shape[2])


def run(
    grad_x: Tensor, grad_y: Tensor, x: Tensor, branch: Tensor, gate: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to residual, branch, gate, shift and scale; see ``kernels/gated_residual_adaln.py``."""
    inputs = [tensor.contiguous() for tensor in (grad_x, grad_y, x, branch)]
    inputs += [rows(gate), rows(scale)]
    samples, tokens, features = x.shape
    sizes, options = config(tokens, features, per_thread=8)
    own = share(samples, tokens, sizes["ROWS"], gpu(x))
    tiles = triton.cdiv(tokens, own)
    grad_residual = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=x.device)
    partials = [torch.empty(samples, tiles, features, dtype=torch.float32, device=x.device) for _ in range(3)]
    if samples * tiles > 0:
        tensors = *inputs, grad_residual, grad_branch, *partials
        strides = inputs[4].stride(0), inputs[5].stride(0)
        _kernel[(samples * tiles,)](*tensors, tokens, features, *strides, own, EPS=EPS, **sizes, **options)
    grad_gate, grad_shift, grad_scale = (partial.sum(dim=1).to(gate.dtype) for partial in partials)
    return grad_residual, grad_branch, grad_gate, grad_shift, grad_scale


def aot_cases() -> Iterator[Case]:
    """Those of the forward."""
    for case in gated_residual_adaln.aot_cases():
        residual, branch, gate, _, scale = case.args
        grads = torch.empty_like(residual), torch.empty_like(branch)
        yield replace(case, args=(*grads, residual, branch, gate, scale))


@triton.jit(do_not_specialize=["own"])
def _kernel(
    grad_x_ptr,  # [B, tokens, features]
    grad_y_ptr,  # [B, tokens, features]
    x_ptr,  # [B, tokens, features]
    branch_ptr,  # [B, tokens, features]
    gate_ptr,  # [B, features]
    scale_ptr,  # [B, features]
    grad_residual_ptr,  # [B, tokens, features]
    grad_branch_ptr,  # [B, tokens, features]
    gate_partial_ptr,  # [B, tiles, features]
    shift_partial_ptr,  # [B, tiles, features]
    scale_partial_ptr,  # [B, tiles, features]
    tokens,
    features,
    gate_stride,
    scale_stride,
    own,  # tokens per program
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, own)
    program = tl.program_id(0)
    sample, first = program // tiles, program % tiles * own
    gate = load_row(gate_ptr, sample, gate_stride, features, WIDTH)
    scale = load_row(scale_ptr, sample, scale_stride, features, WIDTH)
    grad_gate = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    grad_shift = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    grad_scale = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for token in tl.range(first, tl.minimum(first + own, tokens), ROWS, num_stages=2):
        offsets, mask = places(sample, token, tokens, features, ROWS, WIDTH)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normalized, grad_of_x = layer_norm_backward(x, grad_y * (1 + scale)[None, :], mask, features, EPS)
        grad_shift += grad_y
        grad_scale += grad_y * normalized
        grad += grad_of_x
        grad_gate += grad * branch
        tl.store(grad_residual_ptr + offsets, grad.to(grad_residual_ptr.dtype.element_ty), mask=mask)
        grad_branch = gate[None, :] * grad
        tl.store(grad_branch_ptr + offsets, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, WIDTH)
    place = program.to(tl.int64) * features + columns
    tl.store(gate_partial_ptr + place, tl.sum(grad_gate, axis=0), mask=columns < features)
    tl.store(shift_partial_ptr + place, tl.sum(grad_shift, axis=0), mask=columns < features)
    tl.store(scale_partial_ptr + place, tl.sum(grad_scale, axis=0), mask=columns < features)

"""``adaln_modulate_backward`` in one pass; a program leaves the sums over its tokens, a second pass adds those up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.adaln_modulate import EPS
from diffprune.kernels.triton import Case, adaln_modulate, gpu, refuse_inputs
from diffprune.kernels.triton.tokens import (
    config,
    layer_norm_backward,
    load_row,
    places,
    refuse_width,
    rows,
    share,
)


def refuse(grad_y: Tensor, x: Tensor, scale: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(grad_y, x, scale) or refuse_width(x.shape[2])


def run(grad_y: Tensor, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, shift and scale; see ``kernels/adaln_modulate.py``."""
    grad_y, x, scale = grad_y.contiguous(), x.contiguous(), rows(scale)
    samples, tokens, features = x.shape
    sizes, options = config(tokens, features, per_thread=8)
    own = share(samples, tokens, sizes["ROWS"], gpu(x))
    tiles = triton.cdiv(tokens, own)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shift_partial = torch.empty(samples, tiles, features, dtype=torch.float32, device=x.device)
    scale_partial = torch.empty(samples, tiles, features, dtype=torch.float32, device=x.device)
    if samples * tiles > 0:
        tensors = grad_y, x, scale, grad_x, shift_partial, scale_partial
        _kernel[(samples * tiles,)](*tensors, tokens, features, scale.stride(0), own, EPS=EPS, **sizes, **options)
    return grad_x, shift_partial.sum(dim=1).to(scale.dtype), scale_partial.sum(dim=1).to(scale.dtype)


def aot_cases() -> Iterator[Case]:
    """Those of the forward."""
    for case in adaln_modulate.aot_cases():
        x, shift, scale = case.args
        yield replace(case, args=(torch.empty(x.shape, dtype=shift.dtype, device="meta"), x, scale))


@triton.jit(do_not_specialize=["own"])
def _kernel(
    grad_y_ptr,  # [B, tokens, features]
    x_ptr,  # [B, tokens, features]
    scale_ptr,  # [B, features]
    grad_x_ptr,  # [B, tokens, features]
    shift_partial_ptr,  # [B, tiles, features]
    scale_partial_ptr,  # [B, tiles, features]
    tokens,
    features,
    scale_stride,
    own,  # tokens per program
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, own)
    program = tl.program_id(0)
    sample, first = program // tiles, program % tiles * own
    scale = load_row(scale_ptr, sample, scale_stride, features, WIDTH)
    grad_shift = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    grad_scale = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for token in tl.range(first, tl.minimum(first + own, tokens), ROWS, num_stages=3):
        offsets, mask = places(sample, token, tokens, features, ROWS, WIDTH)
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        normalized, grad_x = layer_norm_backward(x, grad * (1 + scale)[None, :], mask, features, EPS)
        grad_shift += grad
        grad_scale += grad * normalized
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, WIDTH)
    place = program.to(tl.int64) * features + columns
    tl.store(shift_partial_ptr + place, tl.sum(grad_shift, axis=0), mask=columns < features)
    tl.store(scale_partial_ptr + place, tl.sum(grad_scale, axis=0), mask=columns < features)

"""``gated_residual_backward`` in one pass; a program leaves the sums over its tokens, a second pass adds those up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, gated_residual, gpu, refuse_inputs
from diffprune.kernels.triton.tokens import config, load_row, places, refuse_width, rows, share


def refuse(grad_y: Tensor, branch: Tensor, gate: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32, and tokens that fit."""
    return refuse_inputs(grad_y, branch, gate) or refuse_width(branch.shape[2])


def run(grad_y: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to branch and gate; see ``kernels/gated_residual.py``."""
    grad_y, branch, gate = grad_y.contiguous(), branch.contiguous(), rows(gate)
    samples, tokens, features = branch.shape
    sizes, options = config(tokens, features, per_thread=8)
    own = share(samples, tokens, sizes["ROWS"], gpu(branch))
    tiles = triton.cdiv(tokens, own)
    grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    partial = torch.empty(samples, tiles, features, dtype=torch.float32, device=branch.device)
    if partial.numel() > 0:
        tensors = grad_y, branch, gate, grad_branch, partial
        _kernel[(samples * tiles,)](*tensors, tokens, features, gate.stride(0), own, **sizes, **options)
    return grad_branch, partial.sum(dim=1).to(gate.dtype)


def aot_cases() -> Iterator[Case]:
    """Those of the forward."""
    for case in gated_residual.aot_cases():
        yield replace(case, args=(torch.empty_like(case.args[0]), *case.args[1:]))


@triton.jit(do_not_specialize=["own"])
def _kernel(
    grad_y_ptr,  # [B, tokens, features]
    branch_ptr,  # [B, tokens, features]
    gate_ptr,  # [B, features]
    grad_branch_ptr,  # [B, tokens, features]
    partial_ptr,  # [B, tiles, features]: of gate
    tokens,
    features,
    gate_stride,
    own,  # tokens per program
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    tiles = tl.cdiv(tokens, own)
    program = tl.program_id(0)
    sample, first = program // tiles, program % tiles * own
    gate = load_row(gate_ptr, sample, gate_stride, features, WIDTH)
    grad_gate = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for token in tl.range(first, tl.minimum(first + own, tokens), ROWS, num_stages=3):
        offsets, mask = places(sample, token, tokens, features, ROWS, WIDTH)
        grad = tl.load(grad_y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        branch = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        grad_gate += grad * branch
        grad_branch = gate[None, :] * grad
        tl.store(grad_branch_ptr + offsets, grad_branch.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, WIDTH)
    place = partial_ptr + program.to(tl.int64) * features + columns
    tl.store(place, tl.sum(grad_gate, axis=0), mask=columns < features)

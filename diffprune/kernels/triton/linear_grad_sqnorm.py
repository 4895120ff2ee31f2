"""``linear_grad_sqnorm`` by Gram tiles, direct tiles or, for one token, the product of two norms.

Gram form, Σ(A·Aᵀ + 1)∘(G·Gᵀ): a program makes one tile of both Gram matrices in registers and multiplies them. Only
tiles on and above the diagonal are made (those above count twice), and a tile on it reads its rows once. Samples of few
tokens share a tile, whose terms of two samples are dropped. The direct form is in ``linear_grad_sqnorm_direct.py``. The
form with fewer operations runs (``form_of``). Tiles leave partial sums and no float is added atomically: the same bits
each time.

Bound, DiT-XL/2's qkv (I=1152, O=3456, T=256) in bfloat16 by the Gram form: three tiles of 128 take 0.45 GFLOP per
sample, and A and G are 2.36 MB: 0.57 µs at 790 TFLOP/s, 0.79 µs at 3.0 TB/s on an H100. Memory-bound, by little.

Cancellation: float32 errors are relative to the terms, not to their sum. Where a sample's terms sum up to less than
1/CANCELLATION of their absolute values (inputs that share a mean, gradients that sum to 0 over the tokens), a second
kernel redoes that sample by the direct form, which loses only the root of that. It is always launched, looks at one
flag per sample and ends if none is set, so the host never waits.

float16 and bfloat16 are multiplied on tensor cores with float32 sums, float32 exactly (``input_precision="ieee"``).

Norm and dot with a direction in one pass: ``linear_grad_sqnorm_dot``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, gpu, refuse_inputs
from diffprune.kernels.triton.layers import label, layers, tensors
from diffprune.kernels.triton.linear_grad_sqnorm_direct import direct, direct_tile, redo
from diffprune.kernels.triton.tiles import Tile, describable, load, matrix, refuse_rows, source

CANCELLATION = 100
"""A Gram sum whose terms are this many times larger is replaced by the direct form's."""

QUICK = ("XL/2 qkv bfloat16 bfloat16", "XL/2 patch bfloat16 bfloat16", "XL/2 qkv float32 float32")
"""Cases of the default test run."""


def refuse(input: Tensor, grad_output: Tensor, bias: bool) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(input, grad_output) or refuse_rows(input)


def run(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """See ``kernels/linear_grad_sqnorm.py``."""
    samples, tokens = input.shape[:2]
    a, g = matrix(input), matrix(grad_output)
    if len(a) == 0:
        return torch.zeros(samples, dtype=torch.float32, device=a.device)
    if tokens == 1:
        return outer(a, g, bias)
    return form_of(a, g, samples, tokens)(a, g, samples, tokens, bias)


def form_of(a: Tensor, g: Tensor, samples: int, tokens: int) -> Callable[..., Tensor]:
    """``gram`` or ``direct``: whichever takes fewer multiply-adds, padding of the tiles included."""
    side = gram_tile(a, g, samples, tokens, gpu(a)).rows
    _, groups, pairs = gram_tiles(samples, tokens, side)
    high, wide, _, _ = direct_tile(a, g, samples, tokens, gpu(a))
    whole = triton.cdiv(g.shape[1], high) * high * triton.cdiv(a.shape[1], wide) * wide
    return gram if groups * pairs * side**2 * (a.shape[1] + g.shape[1]) < samples * tokens * whole else direct


def outer(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """‖a‖²‖g‖² (+ ‖g‖²) of a [B, I] and g [B, O]: one token per sample."""
    sqnorm = torch.empty(len(a), dtype=torch.float32, device=a.device)
    sizes = a.shape[1], g.shape[1], a.stride(0), g.stride(0)
    _outer_kernel[(len(a),)](a, g, sqnorm, *sizes, BIAS=bias, BLOCK=1024, num_warps=4)
    return sqnorm


def gram(a: Tensor, g: Tensor, samples: int, tokens: int, bias: bool) -> Tensor:
    """Σ(A·Aᵀ + 1)∘(G·Gᵀ) of a [B·T, I] and g [B·T, O], and the direct form where its terms cancel."""
    side, _, step, options = gram_tile(a, g, samples, tokens, gpu(a))
    per, groups, pairs = gram_tiles(samples, tokens, side)
    described = a.element_size() == g.element_size() == 2 and describable(gpu(a), a, g)
    partial = torch.empty(2, groups, pairs, side, dtype=torch.float32, device=a.device)
    _gram_kernel[(groups * pairs,)](
        source(a, (side, step), described),
        source(g, (side, step), described),
        partial,
        len(a),
        tokens,
        per * tokens,
        pairs,
        a.shape[1],
        g.shape[1],
        a.stride(0),
        g.stride(0),
        BIAS=bias,
        DESCRIBED=described,
        SIDE=side,
        STEP=step,
        **options,
    )
    sqnorm = torch.empty(samples, dtype=torch.float32, device=a.device)
    cancelled = torch.empty(samples, dtype=torch.bool, device=a.device)
    length = tokens if per > 1 else pairs * side
    sizes = groups * pairs * side, pairs * side, per, length, CANCELLATION
    _finish_kernel[(samples,)](partial, sqnorm, cancelled, *sizes, BLOCK=256, num_warps=1)
    redo(a, g, tokens, bias, cancelled, sqnorm)
    return sqnorm


def gram_tile(a: Tensor, g: Tensor, samples: int, tokens: int, gpu: Gpu) -> Tile:
    """How the Gram matrices are tiled: squares of 128, or of 64 where those are too few or too large."""
    if max(a.element_size(), g.element_size()) == 4:
        return Tile(64, 64, 16, {"num_warps": 4, "num_stages": 2})
    _, groups, pairs = gram_tiles(samples, tokens, 128)
    if tokens > 64 and groups * pairs >= gpu.processors:
        return Tile(128, 128, 64 if gpu.capability >= 90 else 32, {"num_warps": 8, "num_stages": 4})
    return Tile(64, 64, 64, {"num_warps": 4, "num_stages": 4})


def gram_tiles(samples: int, tokens: int, side: int) -> tuple[int, int, int]:
    """Whole samples per tile (at least 1), groups of that many samples, and tiles per group, upper ones only."""
    per = max(1, side // tokens)
    across = triton.cdiv(per * tokens, side)
    return per, triton.cdiv(samples, per), across * (across + 1) // 2


def aot_cases() -> Iterator[Case]:
    """The layers of DiT-S/2 and DiT-XL/2; one of 1024 tokens; and mixed inputs."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtypes in ((half, half), (brain, brain), (full, full), (full, brain)):
        for name, sizes in (layers() | {"S/2 proj T=1024": (1024, 384, 384)}).items():
            named = label(name, *dtypes)
            yield Case(named, (*tensors(sizes, *dtypes), True), quick=named in QUICK)


@triton.jit
def _gram_kernel(
    input,  # A: [rows, wide]
    grad_output,  # G: [rows, high]
    partial_ptr,  # [2, groups, pairs, SIDE]
    rows,
    tokens,
    span,  # rows of a group of samples
    pairs,
    wide,
    high,
    input_stride,
    grad_stride,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Row sums of one tile of (A·Aᵀ + 1)∘(G·Gᵀ), twice those of a tile off the diagonal; and of its absolute values."""
    program = tl.program_id(0)
    pair = program % pairs
    j = ((tl.sqrt(8.0 * pair + 1) - 1) / 2).to(tl.int32)
    j += ((j + 1) * (j + 2) // 2 <= pair).to(tl.int32)
    j -= (j * (j + 1) // 2 > pair).to(tl.int32)
    i = pair - j * (j + 1) // 2
    first = program // pairs * span
    row, column = first + i * SIDE, first + j * SIDE

    # The branch is out here, and each side stores: sums that the hardware adds up to in the background must not come
    # out of a branch, else ptxas lets each product wait for the one before ("wgmma are serialized").
    if i == j:
        own = _gram_tile(input, row, column, rows, wide, input_stride, SIDE, STEP, DESCRIBED, True)
        if BIAS:
            own += 1.0
        own *= _gram_tile(grad_output, row, column, rows, high, grad_stride, SIDE, STEP, DESCRIBED, True)
        _store_sums(partial_ptr, own, i * SIDE, j * SIDE, span, tokens, 1.0, SIDE)
    else:
        own = _gram_tile(input, row, column, rows, wide, input_stride, SIDE, STEP, DESCRIBED, False)
        if BIAS:
            own += 1.0
        own *= _gram_tile(grad_output, row, column, rows, high, grad_stride, SIDE, STEP, DESCRIBED, False)
        _store_sums(partial_ptr, own, i * SIDE, j * SIDE, span, tokens, 2.0, SIDE)


@triton.jit
def _gram_tile(
    x,  # [rows, width]
    row,
    column,
    rows,
    width,
    stride,
    SIDE: tl.constexpr,
    STEP: tl.constexpr,
    DESCRIBED: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """[SIDE, SIDE] of X·Xᵀ from (row, column), which are equal if DIAGONAL."""
    tile = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for k in range(0, width, STEP):
        left = load(x, row, k, rows, width, stride, SIDE, STEP, DESCRIBED)
        right = left if DIAGONAL else load(x, column, k, rows, width, stride, SIDE, STEP, DESCRIBED)
        tile = tl.dot(left, right.T, tile, input_precision="ieee")
    return tile


@triton.jit
def _store_sums(
    partial_ptr,  # [2, programs, SIDE]
    products,
    row,
    column,
    span,
    tokens,
    WEIGHT: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Row sums of the terms of one sample of the [SIDE, SIDE] tile from (row, column), and of their absolute values."""
    r, c = row + tl.arange(0, SIDE), column + tl.arange(0, SIDE)
    inside = (c < span)[None, :] & ((r // tokens)[:, None] == (c // tokens)[None, :])  # so r < span as well
    terms = tl.where(inside, products, 0.0)
    places = partial_ptr + tl.program_id(0).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    tl.store(places, WEIGHT * tl.sum(terms, axis=1))
    tl.store(places + tl.num_programs(0).to(tl.int64) * SIDE, WEIGHT * tl.sum(tl.abs(terms), axis=1))


@triton.jit(do_not_specialize=["limit"])
def _finish_kernel(
    partial_ptr,  # [2, size]: of terms, of their absolute values; a group of samples has ``group`` of them
    sqnorm_ptr,  # [samples]
    cancelled_ptr,  # [samples] bool
    size,
    group,
    per,  # samples per group
    length,  # of a sample: all of the group's if it has no other
    limit,
    BLOCK: tl.constexpr,
):
    """The sum of one sample's terms, and whether that of their absolute values is over ``limit`` times as large."""
    sample = tl.program_id(0)
    place = partial_ptr + (sample // per).to(tl.int64) * group + sample % per * length
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    absolute = total
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        total += tl.load(place + t, mask=t < length, other=0.0)
        absolute += tl.load(place + tl.cast(size, tl.int64) + t, mask=t < length, other=0.0)
    sqnorm = tl.sum(total)
    tl.store(sqnorm_ptr + sample, sqnorm)
    tl.store(cancelled_ptr + sample, tl.sum(absolute) > limit * sqnorm)


@triton.jit
def _outer_kernel(
    input_ptr,  # A: [samples, wide]
    grad_ptr,  # G: [samples, high]
    sqnorm_ptr,  # [samples]
    wide,
    high,
    input_stride,
    grad_stride,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """‖a‖²‖g‖² (+ ‖g‖²), one sample."""
    sample = tl.program_id(0).to(tl.int64)
    own = _sqnorm(input_ptr + sample * input_stride, wide, BLOCK)
    if BIAS:
        own += 1.0
    tl.store(sqnorm_ptr + sample, own * _sqnorm(grad_ptr + sample * grad_stride, high, BLOCK))


@triton.jit
def _sqnorm(row_ptr, width, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        c = start + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + c, mask=c < width, other=0.0).to(tl.float32)
        squares += x * x
    return tl.sum(squares)

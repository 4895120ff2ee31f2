"""The direct form of ``linear_grad_sqnorm``, Σ(Gᵀ·A)²: tiles as deep as there are tokens, squared in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Gpu, gpu
from diffprune.kernels.triton.tiles import Tile, describable, load, multiplied_bytes, product_tile, source


def direct(a: Tensor, g: Tensor, samples: int, tokens: int, bias: bool, only: Tensor | None = None) -> Tensor:
    """Σ(Gᵀ·A)² (+ Σ(Σ_t G)²) of a [B·T, I] and g [B·T, O]; 0 for samples that ``only`` [B] does not mark."""
    device = gpu(a)
    high, wide, step, options = direct_tile(a, g, samples if only is None else 1, tokens, device)
    described = multiplied_bytes(a, g) == 2 and tokens % step == 0 and describable(device, a, g)
    tiles = triton.cdiv(g.shape[1], high) * max(1, triton.cdiv(a.shape[1], wide))
    empty, programs = (torch.empty, samples * tiles) if only is None else (torch.zeros, min(tiles, device.processors))
    partial = empty(samples, tiles, dtype=torch.float32, device=a.device)
    if programs:
        _direct_kernel[(programs,)](
            source(a, (step, wide), described),
            source(g, (step, high), described),
            only,
            partial,
            samples,
            tokens,
            tiles,
            a.shape[1],
            g.shape[1],
            a.stride(0),
            g.stride(0),
            BIAS=bias,
            DESCRIBED=described,
            HIGH=high,
            WIDE=wide,
            STEP=step,
            **options,
        )
    return partial.sum(dim=1)


def direct_tile(a: Tensor, g: Tensor, batch: int, tokens: int, gpu: Gpu) -> Tile:
    """How Gᵀ·A [O, I] of ``batch`` samples is tiled."""
    if multiplied_bytes(a, g) == 4:
        return Tile(64, 32, 16, {"num_warps": 4, "num_stages": 2})
    return product_tile(g.shape[1], a.shape[1], tokens, gpu, batch)


@triton.jit
def _direct_kernel(
    input,  # A: [samples · tokens, wide]
    grad_output,  # G: [samples · tokens, high]
    only_ptr,  # [samples] bool, or None
    partial_ptr,  # [samples, tiles]
    samples,
    tokens,
    tiles,
    wide,
    high,
    input_stride,
    grad_stride,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums of squares of tiles of Gᵀ·A: one tile per program, or all tiles of the samples marked in ``only``."""
    program = tl.program_id(0)
    if only_ptr is None:
        sample, tile = program // tiles, program % tiles
        total = _direct_tile(
            input, grad_output, sample, tile, tokens, wide, high, input_stride, grad_stride,
            BIAS, DESCRIBED, HIGH, WIDE, STEP,
        )  # fmt: skip
        tl.store(partial_ptr + program.to(tl.int64), total)
    else:
        for sample in range(samples):
            if tl.load(only_ptr + sample):
                for tile in range(program, tiles, tl.num_programs(0)):
                    total = _direct_tile(
                        input, grad_output, sample, tile, tokens, wide, high, input_stride, grad_stride,
                        BIAS, DESCRIBED, HIGH, WIDE, STEP,
                    )  # fmt: skip
                    tl.store(partial_ptr + tl.cast(sample, tl.int64) * tiles + tile, total)


@triton.jit
def _direct_tile(
    input,
    grad_output,
    sample,
    tile,
    tokens,
    wide,
    high,
    input_stride,
    grad_stride,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    across = tl.maximum(1, tl.cdiv(wide, WIDE))
    o, i = tile // across * HIGH, tile % across * WIDE
    first, end = sample * tokens, (sample + 1) * tokens
    product = tl.zeros((HIGH, WIDE), dtype=tl.float32)
    for t in range(first, end, STEP):
        g = load(grad_output, t, o, end, high, grad_stride, STEP, HIGH, DESCRIBED)
        a = load(input, t, i, end, wide, input_stride, STEP, WIDE, DESCRIBED)
        if g.dtype != a.dtype:
            g, a = g.to(tl.float32), a.to(tl.float32)
        product = tl.dot(g.T, a, product, input_precision="ieee")
    total = tl.sum(product * product)
    if BIAS and i == 0:
        column = tl.zeros((HIGH,), dtype=tl.float32)
        for t in tl.range(first, end, STEP, num_stages=3):
            g = load(grad_output, t, o, end, high, grad_stride, STEP, HIGH, DESCRIBED)
            column += tl.sum(g.to(tl.float32), axis=0)
        total += tl.sum(column * column)
    return total

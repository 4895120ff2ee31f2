"""The direct form of ``linear_grad_sqnorm``, Σ(Gᵀ·A)²: tiles as deep as there are tokens, squared in registers.

With a direction M also Σ(Gᵀ·A)∘M, from the same tiles: ``linear_grad_sqnorm_dot``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Gpu, gpu
from diffprune.kernels.triton.tiles import (
    Tile,
    describable,
    exact_tile,
    load,
    matrix,
    multiplied_bytes,
    product_tile,
    source,
)


def direct(a: Tensor, g: Tensor, samples: int, tokens: int, bias: bool) -> Tensor:
    """Σ(Gᵀ·A)² (+ Σ(Σ_t G)²) of a [B·T, I] and g [B·T, O]."""
    return _partial(a, g, samples, tokens, bias, direct_tile(a, g, samples, tokens, gpu(a))).sum(dim=2)[0]


def redo(a: Tensor, g: Tensor, tokens: int, bias: bool, marked: Tensor, sqnorm: Tensor) -> None:
    """Write ``direct``'s answer over the samples of ``sqnorm`` [B] that ``marked`` [B] marks, B at least 1."""
    samples = len(sqnorm)
    partial = _partial(a, g, samples, tokens, bias, direct_tile(a, g, 1, tokens, gpu(a)), marked)[0]
    _redo_kernel[(samples,)](partial, marked, sqnorm, partial.shape[1], BLOCK=256, num_warps=1)


def with_direction(
    a: Tensor, g: Tensor, samples: int, tokens: int, direction: Tensor, bias_direction: Tensor | None
) -> Tensor:
    """[2, B]: Σ(Gᵀ·A)² and Σ(Gᵀ·A)∘M of a [B·T, I], g [B·T, O] and a direction [O, I]; with those of the bias."""
    tile = dot_tile(a, g, samples, tokens, gpu(a))
    partial = _partial(a, g, samples, tokens, bias_direction is not None, tile, None, direction, bias_direction)
    return partial.sum(dim=2)


def _partial(
    a: Tensor,
    g: Tensor,
    samples: int,
    tokens: int,
    bias: bool,
    tile: Tile,
    only: Tensor | None = None,
    direction: Tensor | None = None,
    bias_direction: Tensor | None = None,
) -> Tensor:
    """[1 or, with a direction, 2, B, tiles]: what the sums are sums of; of samples ``only`` does not mark, anything."""
    high, wide, step, options = tile
    device = gpu(a)
    described = multiplied_bytes(a, g) == 2 and tokens % step == 0 and describable(device, a, g)
    tiles = triton.cdiv(g.shape[1], high) * max(1, triton.cdiv(a.shape[1], wide))
    programs = samples * tiles if only is None else min(tiles, device.processors)
    partial = torch.empty(1 if direction is None else 2, samples, tiles, dtype=torch.float32, device=a.device)
    direction = None if direction is None else matrix(direction)
    if programs:
        _direct_kernel[(programs,)](
            source(a, (step, wide), described),
            source(g, (step, high), described),
            direction,
            bias_direction,
            only,
            partial,
            samples,
            tokens,
            tiles,
            a.shape[1],
            g.shape[1],
            a.stride(0),
            g.stride(0),
            0 if direction is None else direction.stride(0),
            0 if bias_direction is None else bias_direction.stride(0),
            BIAS=bias,
            DESCRIBED=described,
            HIGH=high,
            WIDE=wide,
            STEP=step,
            **options,
        )
    return partial


def direct_tile(a: Tensor, g: Tensor, batch: int, tokens: int, gpu: Gpu) -> Tile:
    """How Gᵀ·A [O, I] of ``batch`` samples is tiled."""
    if multiplied_bytes(a, g) == 4:
        return exact_tile(gpu) or Tile(64, 32, 16, {"num_warps": 4, "num_stages": 2})
    return product_tile(g.shape[1], a.shape[1], tokens, gpu, batch)


def dot_tile(a: Tensor, g: Tensor, batch: int, tokens: int, gpu: Gpu) -> Tile:
    """How Gᵀ·A is tiled if M's tile is multiplied with it: 128 × 128 at most, for M takes registers too."""
    tile = direct_tile(a, g, batch, tokens, gpu)
    if multiplied_bytes(a, g) == 4:
        return tile
    return tile._replace(rows=min(tile.rows, 128), options={"num_warps": 8, "num_stages": 3})


@triton.jit
def _direct_kernel(
    input,  # A: [samples · tokens, wide]
    grad_output,  # G: [samples · tokens, high]
    direction_ptr,  # M: [high, wide], or None
    bias_ptr,  # m: [high], or None
    only_ptr,  # [samples] bool, or None
    partial_ptr,  # [1 or 2, samples, tiles]: of the squares and, with M, of the products with it
    samples,
    tokens,
    tiles,
    wide,
    high,
    input_stride,
    grad_stride,
    direction_stride,
    bias_stride,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Sums over tiles of Gᵀ·A: one tile per program, or all tiles of the samples marked in ``only`` (squares alone)."""
    program = tl.program_id(0)
    if only_ptr is None:
        sample, tile = program // tiles, program % tiles
        squares, dot = _direct_tile(
            input, grad_output, direction_ptr, bias_ptr, sample, tile, tokens, wide, high,
            input_stride, grad_stride, direction_stride, bias_stride, BIAS, DESCRIBED, HIGH, WIDE, STEP,
        )  # fmt: skip
        tl.store(partial_ptr + program.to(tl.int64), squares)
        if direction_ptr is not None:
            tl.store(partial_ptr + tl.num_programs(0).to(tl.int64) + program, dot)
    else:
        last = 0  # the samples up to the last that is marked: most often none
        for start in range(0, samples, 256):
            number = start + tl.arange(0, 256)
            marked = tl.load(only_ptr + number, mask=number < samples, other=0).to(tl.int32)
            last = tl.maximum(last, tl.max(marked * (number + 1), axis=0))
        for sample in range(last):
            if tl.load(only_ptr + sample):
                for tile in range(program, tiles, tl.num_programs(0)):
                    squares, _ = _direct_tile(
                        input, grad_output, None, None, sample, tile, tokens, wide, high,
                        input_stride, grad_stride, 0, 0, BIAS, DESCRIBED, HIGH, WIDE, STEP,
                    )  # fmt: skip
                    tl.store(partial_ptr + tl.cast(sample, tl.int64) * tiles + tile, squares)


@triton.jit
def _direct_tile(
    input,
    grad_output,
    direction_ptr,
    bias_ptr,
    sample,
    tile,
    tokens,
    wide,
    high,
    input_stride,
    grad_stride,
    direction_stride,
    bias_stride,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HIGH: tl.constexpr,
    WIDE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Of one tile the sum of squares, and of the products with M's (0 without M)."""
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
    dot = 0.0
    if direction_ptr is not None:
        m = load(direction_ptr, o, i, high, wide, direction_stride, HIGH, WIDE, False)
        dot += tl.sum(product * m.to(tl.float32))
    squares = tl.sum(product * product)
    if BIAS and i == 0:
        column = tl.zeros((HIGH,), dtype=tl.float32)
        for t in tl.range(first, end, STEP, num_stages=3):
            g = load(grad_output, t, o, end, high, grad_stride, STEP, HIGH, DESCRIBED)
            column += tl.sum(g.to(tl.float32), axis=0)
        squares += tl.sum(column * column)
        if bias_ptr is not None:
            r = o + tl.arange(0, HIGH)
            bias = tl.load(bias_ptr + r.to(tl.int64) * bias_stride, mask=r < high, other=0.0)
            dot += tl.sum(column * bias.to(tl.float32))
    return squares, dot


@triton.jit
def _redo_kernel(
    partial_ptr,  # [samples, tiles]
    marked_ptr,  # [samples] bool
    sqnorm_ptr,  # [samples]
    tiles,
    BLOCK: tl.constexpr,
):
    """The sum over a sample's tiles, if it is marked."""
    sample = tl.program_id(0).to(tl.int64)
    if tl.load(marked_ptr + sample):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, tiles, BLOCK):
            t = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + sample * tiles + t, mask=t < tiles, other=0.0)
        tl.store(sqnorm_ptr + sample, tl.sum(total))

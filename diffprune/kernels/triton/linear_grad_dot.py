"""``linear_grad_dot`` as one matrix product with a dot product for an epilogue: the product is never stored.

The product is taken on the narrower side: (A·Mᵀ)∘G if O <= I, else (G·M)∘A. Both take 2·T·I·O operations per sample;
the narrower side has fewer and deeper tiles, so less is spent on starting and ending them, and its epilogue reads the
smaller tensor. The bias term Σ G·m rides along: added to A·Mᵀ before the epilogue, or else shared out over the tiles of
a row. Rows are tokens of all samples alike: each tile leaves one float32 sum per row, so a tile may reach over several
samples, no float is added atomically, and one sum over [tiles, B, T] makes the answer, the same bits each time.

Bound, DiT-XL/2's qkv (I=1152, O=3456, T=256) in bfloat16: 2.04 GFLOP per sample for 2.36 MB of A and G (M, 8 MB, is
read once per call), 860 operations per byte where an H100 balances at about 260: compute-bound, 2.6 µs per sample at
790 TFLOP/s. A stored product would be written and read again, 1.2 MB more.

float16 and bfloat16 are multiplied on tensor cores with float32 sums. float32 is multiplied exactly, not as TF32
(``input_precision="ieee"``), without tensor cores: 67 TFLOP/s at most on an H100. A float32 direction with bfloat16
tensors is split into three bfloat16 pieces that add up to it; other mixed inputs are multiplied as float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, Gpu, gpu, refuse_inputs
from diffprune.kernels.triton.layers import label, layers, tensors
from diffprune.kernels.triton.tiles import (
    Tile,
    describable,
    exact_tile,
    load,
    matrix,
    multiplied_bytes,
    product_tile,
    refuse_rows,
    source,
)

GROUP = 8
"""Tiles of rows that are worked on together, so that their tiles of columns share what is read through the L2 cache."""

QUICK = ("XL/2 qkv bfloat16 bfloat16", "XL/2 proj bfloat16 bfloat16 no bias", "XL/2 qkv float32 float32")
"""Cases of the default test run."""


def refuse(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(input, grad_output, direction, bias_direction) or refuse_rows(input)


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> Tensor:
    """See ``kernels/linear_grad_dot.py``."""
    samples, tokens, wide = input.shape
    a, g = matrix(input), matrix(grad_output)
    transposed = g.shape[1] <= wide or wide == 0
    left, other = (a, g) if transposed else (g, a)
    parts = pieces(direction, left.dtype)
    m = matrix(parts)
    (rows, depth), width = left.shape, other.shape[1]
    device, itemsize = gpu(input), multiplied_bytes(left, m)
    height, columns, step, options = config(rows, width, depth, itemsize, device)
    described = itemsize == 2 and describable(device, left, m, other)
    tiles = triton.cdiv(width, columns)
    partial = torch.empty(tiles, rows, dtype=torch.float32, device=input.device)
    if partial.numel():
        _kernel[(triton.cdiv(rows, height) * tiles,)](
            source(left, (height, step), described),
            source(m, (columns, step) if transposed else (step, columns), described),
            source(other, (height, columns), described),
            bias_direction,
            partial,
            rows,
            width,
            depth,
            left.stride(0),
            m.stride(0),
            other.stride(0),
            0 if bias_direction is None else bias_direction.stride(0),
            PIECES=len(parts),
            TRANSPOSED=transposed,
            BIAS=bias_direction is not None,
            DESCRIBED=described,
            GROUP=GROUP,
            ROWS=height,
            COLUMNS=columns,
            STEP=step,
            **options,
        )
    return partial.view(tiles, samples, tokens).sum(dim=(0, 2))


def pieces(direction: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, O, I]: what is multiplied with ``dtype`` and adds up to ``direction``.

    Three pieces of bfloat16 hold all 24 bits of a float32: three products on tensor cores instead of one without them.
    """
    if not splits(direction, dtype):
        return direction[None]
    high = direction.to(dtype)
    middle = (direction - high).to(dtype)
    return torch.stack([high, middle, (direction - high - middle).to(dtype)])


def splits(direction: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``pieces`` are three."""
    return (direction.dtype, dtype) == (torch.float32, torch.bfloat16)


def config(rows: int, width: int, depth: int, itemsize: int, gpu: Gpu) -> Tile:
    """How the product [rows, width] is tiled. ``itemsize``: bytes of the elements that are multiplied."""
    if itemsize == 4:
        return exact_tile(gpu) or Tile(128, 64, 16, {"num_warps": 8, "num_stages": 2})
    tile = product_tile(rows, width, depth, gpu)
    if gpu.capability >= 100 and tile.rows * tile.columns == 128 * 128:
        tile.options["num_warps"] = 8  # the sums leave tensor memory all at once: too many registers for four warps
    return tile


def aot_cases() -> Iterator[Case]:
    """The layers of DiT-S/2 and DiT-XL/2; the direction in float32 too; and some without biases."""
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtype, other in ((half, half), (brain, brain), (full, full), (half, full), (brain, full)):
        for name, sizes in layers().items():
            a, g, m = tensors(sizes, dtype, dtype, other)
            named = label(name, dtype, other)
            yield Case(named, (a, g, m, m.new_empty(len(m))), quick=named in QUICK)
    for other in (brain, full):
        for name in ("S/2 proj", "XL/2 proj", "XL/2 fc1", "XL/2 fc2"):
            named = f"{label(name, brain, other)} no bias"
            yield Case(named, (*tensors(layers()[name], brain, brain, other), None), quick=named in QUICK)


@triton.jit
def _kernel(
    left,  # [rows, depth]: A if TRANSPOSED, else G
    right,  # [PIECES · width, depth] if TRANSPOSED, else [PIECES · depth, width]; the pieces add up to M
    other,  # [rows, width]: G if TRANSPOSED, else A
    bias_ptr,  # [O]: width elements if TRANSPOSED, else depth
    partial_ptr,  # [tiles of columns, rows]
    rows,
    width,
    depth,
    left_stride,
    right_stride,
    other_stride,
    bias_stride,
    PIECES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """partial[j, r] = Σ_c (left · right)[r, c] · other[r, c] over the columns c of tile j."""
    program, tiles = tl.program_id(0), tl.cdiv(width, COLUMNS)
    group = program // (GROUP * tiles)
    heights = tl.minimum(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    row = (group * GROUP + program % (GROUP * tiles) % heights) * ROWS
    tile = program % (GROUP * tiles) // heights
    column = tile * COLUMNS

    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for piece in range(PIECES):
        # At least one step, of zeros if need be: where there may be none, ptxas of Triton 3.6 lets each product wait.
        for k in range(0, tl.maximum(depth, 1), STEP):
            x = load(left, row, k, rows, depth, left_stride, ROWS, STEP, DESCRIBED)
            if TRANSPOSED:
                n, total = piece * width + column, PIECES * width
                y = load(right, n, k, total, depth, right_stride, COLUMNS, STEP, DESCRIBED).T
            else:
                n, total = piece * depth + k, PIECES * depth
                y = load(right, n, column, total, width, right_stride, STEP, COLUMNS, DESCRIBED)
            if x.dtype != y.dtype:
                x, y = x.to(tl.float32), y.to(tl.float32)
            product = tl.dot(x, y, product, input_precision="ieee")

    if BIAS and TRANSPOSED:
        c = column + tl.arange(0, COLUMNS)
        product += tl.load(bias_ptr + c.to(tl.int64) * bias_stride, mask=c < width, other=0.0).to(tl.float32)[None, :]
    z = load(other, row, column, rows, width, other_stride, ROWS, COLUMNS, DESCRIBED)
    dots = tl.sum(product * z.to(tl.float32), axis=1)
    if BIAS and not TRANSPOSED:  # the tiles of these rows share out the columns of G
        share = tl.cdiv(tl.cdiv(depth, STEP), tiles) * STEP
        for k in tl.range(tile * share, tl.minimum(depth, (tile + 1) * share), STEP, num_stages=3):
            x = load(left, row, k, rows, depth, left_stride, ROWS, STEP, DESCRIBED)
            c = k + tl.arange(0, STEP)
            bias = tl.load(bias_ptr + c.to(tl.int64) * bias_stride, mask=c < depth, other=0.0)
            dots += tl.sum(x.to(tl.float32) * bias.to(tl.float32)[None, :], axis=1)
    r = row + tl.arange(0, ROWS)
    tl.store(partial_ptr + tile.to(tl.int64) * rows + r, dots, mask=r < rows)

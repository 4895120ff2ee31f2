"""``linear_grad_sqnorm_dot`` from tiles of Gᵀ·A, each squared and multiplied by M's; or by the other two kernels.

The tiles take T·I·O multiply-adds per sample, as many as the dot's own product, so the norm costs nothing more. And M
is not an operand of the product: in float32 beside 16-bit tensors it costs its bytes alone, where the dot's own product
takes three times the operations, or float32's. But the tiles are only T deep: 256 tokens are four steps, where the
dot's own product has I or O of depth. What a tile takes besides its steps then weighs as much as they do: filling the
pipeline, reading M's tile (two to four steps' bytes) and reducing. ``pays`` counts all of it: with M in 16 bits one
pass pays for DiT-XL/2's blocks at 1024 tokens and not at 256, for layers with a narrow side, as its first and last, at
both; with M in float32 for all of them at both.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from diffprune.kernels.triton import Case, linear_grad_dot, linear_grad_sqnorm
from diffprune.kernels.triton.layers import label, layers, tensors
from diffprune.kernels.triton.linear_grad_sqnorm_direct import with_direction
from diffprune.kernels.triton.tiles import matrix, multiplied_bytes

EDGE = 256
"""What a tile takes besides its product, as multiply-adds per element: an estimate, never measured.

Counted: one step of 64 of a 256 × 128 tile is 4.2 MFLOP, 0.7 µs of one multiprocessor's share of an H100's matrix
rate. Assumed: that starting and ending a tile takes as long as four such steps.
"""

QUICK = ("XL/2 qkv bfloat16 float32", "S/2 proj T=1024 bfloat16 bfloat16")
"""Cases of the default test run."""


def refuse(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> str | None:
    """What ``linear_grad_dot`` refuses."""
    return linear_grad_dot.refuse(input, grad_output, direction, bias_direction)


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> tuple[Tensor, Tensor]:
    """See ``kernels/linear_grad_sqnorm_dot.py``."""
    samples, tokens, _ = input.shape
    if at_once(input, grad_output, direction):
        sums = with_direction(matrix(input), matrix(grad_output), samples, tokens, direction, bias_direction)
        return sums[0].clone(), sums[1].clone()
    sqnorm = linear_grad_sqnorm.run(input, grad_output, bias_direction is not None)
    return sqnorm, linear_grad_dot.run(input, grad_output, direction, bias_direction)


def at_once(input: Tensor, grad_output: Tensor, direction: Tensor) -> bool:
    """Whether one pass pays."""
    sizes = *input.shape[1:], grad_output.shape[2]
    if input.shape[1] < 2:
        return False  # the norm is that of two vectors
    if multiplied_bytes(input, grad_output) == 4:
        return pays(*sizes, edge=EDGE // 16)  # of products that are so much slower
    mixed = direction.dtype != input.dtype
    return pays(*sizes, times=3 if linear_grad_dot.splits(direction, input.dtype) else 16 if mixed else 1)


def pays(tokens: int, wide: int, high: int, times: int = 1, edge: int = EDGE) -> bool:
    """Whether one pass takes fewer operations than two, the edges of tiles of 128 × 128 counted.

    ``times``: what a multiply-add of the dot's own product costs, in those of the one pass.
    """
    once = wide * high * (tokens + edge)
    dot = tokens * min(wide, high) * (times * max(wide, high) + edge)
    side = triton.cdiv(tokens, 128)
    gram = side * (side + 1) // 2 * min(tokens, 128) ** 2 * (wide + high + 2 * edge)
    return once < dot + min(gram, once)


def aot_cases() -> Iterator[Case]:
    """The layers of DiT-S/2 and DiT-XL/2 at 256 and at 1024 tokens where one pass pays: elsewhere the other two ops'.

    The direction in float32 too.
    """
    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    sizes = layers() | {f"{name} T=1024": size for name, size in layers(1024).items()}
    for dtype, other in ((half, half), (brain, brain), (full, full), (half, full), (brain, full)):
        for name, size in sizes.items():
            a, g, m = tensors(size, dtype, dtype, other)
            if at_once(a, g, m):
                named = label(name, dtype, other)
                yield Case(named, (a, g, m, m.new_empty(len(m))), quick=named in QUICK)

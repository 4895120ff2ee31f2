"""``flow_interpolate`` in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, refuse_inputs
from diffprune.kernels.triton.philox import normal_noise


def refuse(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(x1, t)


def run(x1: Tensor, t: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """See ``kernels/flow_interpolate.py``."""
    xt = torch.empty(x1.shape, dtype=x1.dtype, device=x1.device)
    samples, elements = x1.shape[0], x1.shape[1:].numel()
    block, options = config(elements)
    grid = samples * triton.cdiv(elements, block)
    if grid > 0:
        _interpolate[(grid,)](
            x1.contiguous(), t.contiguous(), hashes.contiguous(), xt, elements, seed, draw, BLOCK=block, **options
        )
    return xt


def config(elements: int) -> tuple[int, dict[str, int]]:
    """Elements per program and launch options: 8 elements, so two Philox blocks, per thread."""
    block = min(1024, max(32, triton.next_power_of_2(elements)))
    return block, {"num_warps": max(1, block // 256)}


def aot_cases() -> Iterator[Case]:
    """Latents of DiT at 256 and 512 pixels, and MNIST."""
    for label, shape, dtype in [
        ("4x32x32 float32", (256, 4, 32, 32), torch.float32),
        ("4x64x64 float16", (256, 4, 64, 64), torch.float16),
        ("1x28x28 float32", (256, 1, 28, 28), torch.float32),
    ]:
        x1 = torch.empty(shape, dtype=dtype, device="meta")
        t = torch.empty(shape[0], device="meta")
        hashes = torch.empty(shape[0], dtype=torch.int64, device="meta")
        yield Case(label, (x1, t, hashes, 0, 0), quick=dtype == torch.float16)


@triton.jit(do_not_specialize=["seed", "draw"])
def _interpolate(
    x1_ptr,  # [B, elements]
    t_ptr,  # [B]
    hashes_ptr,  # [B]
    xt_ptr,  # [B, elements]
    elements,
    seed,
    draw,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(elements, BLOCK)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start = sample.to(tl.int64) * elements + tile.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - tile.to(tl.int64) * BLOCK
    x1 = tl.load(x1_ptr + start + offsets, mask=mask).to(tl.float32)
    t = tl.load(t_ptr + sample).to(tl.float32)
    blocks = tile.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    x0 = normal_noise(blocks, tl.load(hashes_ptr + sample), seed, draw)
    xt = (1 - t) * x0 + t * x1
    tl.store(xt_ptr + start + offsets, xt.to(xt_ptr.dtype.element_ty), mask=mask)

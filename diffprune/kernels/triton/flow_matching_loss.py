"""``flow_matching_loss`` in one pass over velocity and data, and ``flow_matching_loss_grad`` with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffprune.kernels.triton import Case, refuse_inputs
from diffprune.kernels.triton.philox import normal_noise


def refuse(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(velocity, x1)


def run(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """See ``kernels/flow_matching_loss.py``."""
    return launch(velocity, x1, hashes, seed, draw, None)[0]


def launch(
    velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss, and with a weight the gradient."""
    samples, elements = x1.shape[0], x1.shape[1:].numel()
    block, options = config(elements)
    tiles = triton.cdiv(elements, block)
    partial = torch.empty(samples, tiles, dtype=torch.float32, device=x1.device)
    grad = None
    if weight is not None:
        grad = torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
        weight = weight.contiguous()
    if samples > 0:
        inputs = velocity.contiguous(), x1.contiguous(), hashes.contiguous(), weight
        _kernel[(samples * tiles,)](
            *inputs, partial, grad, elements, seed, draw, GRAD=weight is not None, BLOCK=block, **options
        )
    return partial.sum(dim=1) if tiles > 1 else partial.view(samples), grad


def config(elements: int) -> tuple[int, dict[str, int]]:
    """Elements per program and launch options: 8 elements, so two Philox blocks, per thread.

    A latent of up to 4096 elements is one program's, so that its loss needs no second pass.
    """
    block = max(32, triton.next_power_of_2(elements)) if elements <= 4096 else 1024
    return block, {"num_warps": max(1, block // 256)}


def aot_cases() -> Iterator[Case]:
    """Latents of DiT at 256 and 512 pixels, and MNIST."""
    for label, shape, dtype in [
        ("4x32x32 float32", (256, 4, 32, 32), torch.float32),
        ("4x32x32 bfloat16", (256, 4, 32, 32), torch.bfloat16),
        ("8x32x32 bfloat16", (256, 8, 32, 32), torch.bfloat16),
        ("1x28x28 float32", (256, 1, 28, 28), torch.float32),
    ]:
        velocity = torch.empty(shape, dtype=dtype, device="meta")
        x1 = torch.empty(shape, device="meta")
        hashes = torch.empty(shape[0], dtype=torch.int64, device="meta")
        yield Case(label, (velocity, x1, hashes, 0, 0), quick=label == "4x32x32 bfloat16")


@triton.jit(do_not_specialize=["seed", "draw"])
def _kernel(
    velocity_ptr,  # [B, elements]
    x1_ptr,  # [B, elements]
    hashes_ptr,  # [B]
    weight_ptr,  # [B] if GRAD
    partial_ptr,  # [B, tiles]
    grad_ptr,  # [B, elements] if GRAD
    elements,
    seed,
    draw,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[b, j] = 1/n·Σ (v − (x1 − x0))² over the elements of tile j of sample b."""
    tiles = tl.cdiv(elements, BLOCK)
    sample, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    start = sample.to(tl.int64) * elements + tile.to(tl.int64) * BLOCK
    offsets = tl.arange(0, BLOCK)
    mask = offsets < elements - tile.to(tl.int64) * BLOCK
    velocity = tl.load(velocity_ptr + start + offsets, mask=mask).to(tl.float32)
    x1 = tl.load(x1_ptr + start + offsets, mask=mask).to(tl.float32)
    blocks = tile.to(tl.uint32) * (BLOCK // 4) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    x0 = normal_noise(blocks, tl.load(hashes_ptr + sample), seed, draw)
    error = tl.where(mask, velocity - (x1 - x0), 0.0)
    tl.store(partial_ptr + sample.to(tl.int64) * tiles + tile, tl.sum(error * error) / elements)
    if GRAD:
        factor = 2.0 / elements * tl.load(weight_ptr + sample).to(tl.float32)
        tl.store(grad_ptr + start + offsets, (factor * error).to(grad_ptr.dtype.element_ty), mask=mask)

"""``flow_matching_loss`` in one pass over velocity and data, and ``flow_matching_loss_grad`` with it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, HALF, address, refuse_inputs, where
from diffprune.kernels.philox import NOISE_STREAM


def refuse(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(velocity, x1, dtypes=(*HALF, torch.float32))


def run(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int) -> Tensor:
    """See ``kernels/flow_matching_loss.py``."""
    return launch(velocity, x1, hashes, seed, draw, None)[0]


def launch(
    velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss, and with a weight the gradient. In float32, with noise within 5.5e-7 of the definition's."""
    samples, elements = x1.shape[0], x1.shape[1:].numel()
    velocity, x1, hashes = velocity.contiguous(), x1.contiguous(), hashes.contiguous()
    grad = None if weight is None else torch.empty(velocity.shape, dtype=velocity.dtype, device=velocity.device)
    weight = None if weight is None else weight.float().contiguous()
    if samples == 0:
        return torch.empty(0, dtype=torch.float32, device=x1.device), grad
    with where(velocity) as (extension, here):
        tiles = extension.flow_matching_loss_tiles(elements)
        partials = torch.empty(samples, tiles, dtype=torch.float32, device=x1.device)
        arrays = map(address, (velocity, x1, hashes, weight, grad, partials))
        dtypes = DTYPES[velocity.dtype], DTYPES[x1.dtype]
        extension.flow_matching_loss(here, *dtypes, *arrays, samples, elements, seed, NOISE_STREAM, draw)
    return partials.sum(dim=1) if tiles > 1 else partials.view(samples), grad

"""``flow_matching_loss_grad``: the kernel of ``flow_matching_loss``, which writes the gradient too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffprune.kernels.triton import Case, flow_matching_loss, refuse_inputs


def refuse(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor) -> str | None:
    """Only CUDA tensors of float16, bfloat16 or float32."""
    return refuse_inputs(velocity, x1, weight)


def run(velocity: Tensor, x1: Tensor, hashes: Tensor, seed: int, draw: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels/flow_matching_loss.py``."""
    return flow_matching_loss.launch(velocity, x1, hashes, seed, draw, weight)


def aot_cases() -> Iterator[Case]:
    """Those of the loss alone."""
    for case in flow_matching_loss.aot_cases():
        yield replace(case, args=(*case.args, torch.empty(case.args[0].shape[0], device="meta")))

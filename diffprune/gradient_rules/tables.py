"""Rules for tables: an embedding is a matrix whose rows are picked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_layout import body, looked_into
from diffprune.errors import InputError
from diffprune.gradient_parts import Scatter
from diffprune.gradient_rules.registry import rule
from diffprune.weight_tensors import Contribution, Recorder


@rule(F.embedding)
def embedding_with_options(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    if max_norm is not None:
        raise InputError(
            f"embedding {tuple(weight.shape)}: expected max_norm=None, which changes weights in the forward"
        )
    with recorder.tracker, looked_into(func):
        return body(func)(input, weight, padding_idx, max_norm, *args, **kwargs)


@rule(torch.embedding)
def embedding(
    recorder: Recorder,
    func: Callable,
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if scale_grad_by_freq:
        raise InputError(f"embedding {tuple(weight.shape)}: expected scale_grad_by_freq=False, which mixes samples")
    layout = recorder.layout(indices, weight)
    output = recorder.run(func, weight, indices, padding_idx)

    def contribute(indices: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        rows, gradient = recorder.tokens(indices, layout), recorder.tokens(gradient, layout).squeeze(1)
        if padding_idx >= 0:
            gradient = gradient.masked_fill((rows == padding_idx)[..., None], 0)
        yield weight, Scatter(rows, gradient, weight.shape)

    return recorder.record(output, (indices,), contribute, weight)

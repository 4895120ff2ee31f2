"""Rules for tables: an embedding is a matrix whose rows are picked, a codebook one whose nearest row is looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.composites import body, looked_into
from diffprune.errors import InputError
from diffprune.gradient_parts import Dense, Outer, Scatter
from diffprune.gradient_rules.registry import rule, unknown
from diffprune.weight_tensors import Contribution, Recorder, Weight


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


@rule(torch.index_select, Tensor.index_select)
def index_select(recorder: Recorder, func: Callable, input: Tensor, dim: int, index: Tensor) -> Tensor:
    if not isinstance(input, Weight) or dim % max(1, input.dim()):
        raise unknown(func, input, index)
    return picked_rows(recorder, func, input, index, dim)


@rule(Tensor.__getitem__)
def picked_rows(recorder: Recorder, func: Callable, input: Tensor, index: Any, dim: int | None = None) -> Tensor:
    """A table's rows by the numbers that the samples have: `codebook[index]`."""
    if isinstance(index, tuple) and len(index) == 1:
        [index] = index
    if not isinstance(input, Weight) or not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        raise unknown(func, input, index)
    layout = recorder.layout(index, input)
    output = recorder.run(func, input, index) if dim is None else recorder.run(func, input, dim, index)
    table = torch.Size([len(input), input[0].numel()])

    def contribute(index: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        rows = recorder.tokens(index.long().remainder(table[0]), layout)  # from the end, where negative
        gradient = recorder.tokens(gradient.reshape(*index.shape, table[1]), layout).squeeze(1)
        yield input, Scatter(rows, gradient, table)

    return recorder.record(output, (index,), contribute, input)


@rule(torch._VF.cdist)
def distance(recorder: Recorder, func: Callable, x1: Tensor, x2: Tensor, p: float, mode: int | None) -> Tensor:
    """To each row of a table. Where only the index of the nearest is used, no gradient comes and nothing is done."""
    if isinstance(x1, Weight) or x2.dim() != 2 or p != 2:
        raise unknown(func, x1, x2)
    layout = recorder.layout(x1, x2)
    if layout.dim >= x1.dim() - 1:
        raise unknown(func, x1, x2)
    output = recorder.run(func, x1, x2, p, mode)

    def contribute(x1: Tensor, distances: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        pulls = torch.where(distances > 0, gradient / distances, 0)  # row k: Σ_t pull_tk (row_k - x1_t)
        left, right = recorder.tokens(pulls, layout), recorder.tokens(x1, layout)
        yield x2, Outer([(-left, right)])
        yield x2, Dense((left.sum(dim=2).mT * x2.plain.detach()).flatten(1))

    return recorder.record(output, (x1, output), contribute, x2)

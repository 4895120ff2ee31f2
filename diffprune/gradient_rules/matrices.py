"""Rules for matrix products: a weight is a matrix between features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_layout import Layout
from diffprune.errors import InputError
from diffprune.gradient_parts import Outer
from diffprune.gradient_rules.registry import autocast, beside, rule, unknown, weight_names
from diffprune.weight_tensors import Contribution, Recorder, Weight


@rule(F.linear)
def linear(recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    input = autocast(recorder, input, weight, bias)
    layout = _tokens_layout(recorder, input, weight, bias)
    output = recorder.run(func, input, weight, bias)

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            left, right = recorder.tokens(gradient, layout), recorder.tokens(kept[0].conj(), layout)
            yield weight, Outer([(left, right)])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout)

    kept = (input,) if isinstance(weight, Weight) else ()
    return recorder.record(output, kept, contribute, weight, bias)


@rule(torch.addmm, Tensor.addmm)
def addmm(
    recorder: Recorder, func: Callable, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    """With the matrix as [inputs, outputs], as of transformers' `Conv1D`."""
    if isinstance(mat1, Weight) or beta != 1 or alpha != 1 or not (isinstance(input, Weight) or input.dim() == 1):
        raise unknown(func, input, mat1, mat2)
    mat1 = autocast(recorder, mat1, input, mat2)
    layout = _tokens_layout(recorder, mat1, input, mat2)
    output = recorder.run(func, input, mat1, mat2)

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            left, right = recorder.tokens(kept[0].conj(), layout), recorder.tokens(gradient, layout)
            yield mat2, Outer([(left, right)])
        if isinstance(input, Weight):
            yield recorder.dense(input, gradient, layout)

    return recorder.record(output, (mat1,) if isinstance(mat2, Weight) else (), contribute, input, mat2)


@rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm)
def matmul(recorder: Recorder, func: Callable, input: Tensor, other: Tensor) -> Tensor:
    first = isinstance(input, Weight)
    weight, seen = (input, other) if first else (other, input)
    if weight.dim() > 2:
        return matrices_of_samples(recorder, func, input, other)
    if isinstance(seen, Weight) or weight.dim() != 2 or seen.dim() < 2:
        raise unknown(func, input, other)
    seen = autocast(recorder, seen, weight)
    layout = recorder.layout(seen, weight)
    if layout.dim >= seen.dim() - (2 if first else 1):
        raise unknown(func, input, other)
    output = recorder.run(func, input, seen) if first else recorder.run(func, seen, other)

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        if first:
            left, right = recorder.tokens(gradient.mT, layout), recorder.tokens(seen.conj().mT, layout)
        else:
            left, right = recorder.tokens(seen.conj(), layout), recorder.tokens(gradient, layout)
        yield weight, Outer([(left, right)])

    return recorder.record(output, (seen,), contribute, weight)


@rule(torch.bmm, Tensor.bmm)
def matrices_of_samples(recorder: Recorder, func: Callable, input: Tensor, other: Tensor) -> Tensor:
    """A weight that has a matrix for each of those it meets: learned queries, repeated for each sample."""
    weight, seen = (input, other) if isinstance(input, Weight) else (other, input)
    if isinstance(seen, Weight):
        raise unknown(func, input, other)
    wide = beside(recorder, func, weight, seen)
    return func(wide, seen) if weight is input else func(seen, wide)


def _tokens_layout(recorder: Recorder, input: Tensor, *weights: Any) -> Layout:
    layout = recorder.layout(input, *weights)
    if layout.dim >= input.dim() - 1:
        raise InputError(
            f"{', '.join(weight_names(weights))}: expected the batch first and features last, got {tuple(input.shape)}"
        )
    return layout

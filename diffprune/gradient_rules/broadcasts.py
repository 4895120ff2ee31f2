"""Rules for weights that are broadcast: added, multiplied, put beside tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_layout import Layout
from diffprune.gradient_rules.registry import beside, channel_shape, elementwise, rule, unknown
from diffprune.weight_tensors import Contribution, Recorder, Weight


@elementwise(torch.add, Tensor.add, Tensor.add_, torch.sub, Tensor.sub, Tensor.sub_, torch.rsub)
def add(recorder: Recorder, func: Callable, input: Any, other: Any, *, alpha: float = 1) -> Tensor:
    scales = (1, alpha)
    if func in (torch.sub, Tensor.sub, Tensor.sub_):
        scales = (1, -alpha)
    elif func is torch.rsub:
        scales = (-alpha, 1)
    output = recorder.run(func, input, other, alpha=alpha)
    layout = _elementwise_layout(recorder, output, input, other)

    def contribute(gradient: Tensor) -> Iterator[Contribution]:
        for weight, scale in zip((input, other), scales, strict=True):
            if isinstance(weight, Weight):
                yield recorder.dense(weight, gradient if scale == 1 else gradient * scale.conjugate(), layout)

    return recorder.record(output, (), contribute, input, other)


@elementwise(torch.mul, Tensor.mul, Tensor.mul_)
def mul(recorder: Recorder, func: Callable, input: Any, other: Any) -> Tensor:
    weight, seen = (input, other) if isinstance(input, Weight) else (other, input)
    seen = _before(func, seen)
    output = recorder.run(func, input, other)
    layout = _elementwise_layout(recorder, output, input, other)

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        yield recorder.dense(weight, gradient * seen.conj(), layout)

    return recorder.record(output, (seen,), contribute, weight)


@elementwise(torch.div, Tensor.div, Tensor.div_, torch.true_divide, Tensor.true_divide)
def div(recorder: Recorder, func: Callable, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        raise unknown(func, input, other)
    weight, seen = (input, other) if isinstance(input, Weight) else (other, input)
    seen = _before(func, seen)
    output = recorder.run(func, input, other)
    layout = _elementwise_layout(recorder, output, input, other)

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        down = weight.plain.detach().conj()
        terms = gradient / seen.conj() if weight is input else -gradient * seen.conj() / down.square()
        yield recorder.dense(weight, terms, layout)

    return recorder.record(output, (seen,), contribute, weight)


@elementwise(torch.where)
def where(recorder: Recorder, func: Callable, condition: Tensor, input: Any, other: Any) -> Tensor:
    output = recorder.run(func, condition, input, other)
    layout = _elementwise_layout(recorder, output, condition, input, other)

    def contribute(condition: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        for weight, chosen in ((input, condition), (other, ~condition)):
            if isinstance(weight, Weight):
                yield recorder.dense(weight, gradient * chosen, layout)

    return recorder.record(output, (condition,), contribute, input, other)


@rule(torch.prelu)
def prelu(recorder: Recorder, func: Callable, input: Tensor, weight: Weight) -> Tensor:
    output = recorder.run(func, input, weight)
    layout = recorder.layout(input, weight)

    def contribute(input: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        shape = channel_shape(weight, gradient) if weight.numel() > 1 else None
        yield recorder.dense(weight, gradient * input.clamp(max=0), layout, shape)

    return recorder.record(output, (input,), contribute, weight)


@elementwise(torch.cat, torch.concat, torch.concatenate)
def cat(recorder: Recorder, func: Callable, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    output = recorder.run(func, tensors, dim)
    dim %= output.dim()
    weights = [x for x in tensors if isinstance(x, Weight)]
    layouts = {
        recorder.layout(x, *weights)
        for x in tensors
        if not isinstance(x, Weight) and recorder.tracker.depends_on_batch(x)
    }
    if len(layouts) != 1 or dim in {layout.dim for layout in layouts}:
        raise unknown(func, *weights)
    [layout] = layouts

    def contribute(gradient: Tensor) -> Iterator[Contribution]:
        start = 0
        for x in tensors:
            if isinstance(x, Weight):
                yield recorder.dense(x, gradient.narrow(dim, start, x.shape[dim]), layout)
            start += x.shape[dim]

    return recorder.record(output, (), contribute, *weights)


@rule(F.scaled_dot_product_attention)
def attention(
    recorder: Recorder,
    func: Callable,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> Tensor:
    """A weight in the mask, a bias by relative position; queries, keys or values that are learned."""
    seen = [x for x in (query, key, value) if not isinstance(x, Weight) and recorder.tracker.depends_on_batch(x)]
    if not seen:
        raise unknown(func, query, key, value, attn_mask)
    recorder.refuse_mixed(seen, query, key, value, attn_mask)
    query, key, value = (
        beside(recorder, func, x, seen[0]) if isinstance(x, Weight) else x for x in (query, key, value)
    )
    if isinstance(attn_mask, Weight):
        layout = recorder.layout(seen[0], attn_mask)
        shape = [*query.shape[:-1], key.shape[-2]]
        shape[layout.dim] = seen[0].shape[layout.dim]
        attn_mask = recorder.spread(attn_mask, shape, layout)
    return func(query, key, value, attn_mask, *args, **kw)


def _before(func: Callable, seen: Tensor) -> Tensor:
    """What a function sees, also if it then changes it in place."""
    return seen.detach().clone() if func.__name__.endswith("_") else seen


def _elementwise_layout(recorder: Recorder, output: Tensor, *inputs: Any) -> Layout:
    weights = [x for x in inputs if isinstance(x, Weight)]
    samples = [
        x
        for x in inputs
        if isinstance(x, Tensor) and not isinstance(x, Weight) and recorder.tracker.depends_on_batch(x)
    ]
    if not samples:
        raise unknown(torch.add, *weights)
    layouts = [recorder.layout(x, *weights) for x in samples]
    recorder.refuse_mixed(samples, *weights)
    return layouts[0]._replace(dim=layouts[0].dim + output.dim() - samples[0].dim())

"""Rules: what a torch function's use of a weight adds to each sample's gradient. `docs/per_sample.md` adds one.

A rule has the function's own signature behind a `Recorder` and the function. It runs the function, and records with
the output how the weight's part follows from what is kept and from the output's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_layout import BATCH_FIRST, Layout, body, looked_into, refuse_batch_statistics
from diffprune.errors import InputError
from diffprune.gradient_parts import Outer, Patches, Scatter
from diffprune.weight_tensors import Contribution, Recorder, Weight

RULES: dict[Callable, Callable] = {}


def rule(*functions: Callable) -> Callable[[Callable], Callable]:
    """Register a rule for torch functions, as `__torch_function__` names them."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, function))
        return function

    return register


def elementwise(*functions: Callable) -> Callable[[Callable], Callable]:
    """As `rule`, where a weight may come first and be as large as the output."""

    def register(function: Callable) -> Callable:
        function.elementwise = True
        return rule(*functions)(function)

    return register


# Matrices


@rule(F.linear)
def linear(recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    input = _autocast(recorder, input, weight, bias)
    layout = _tokens_layout(recorder, input, weight, bias)
    output = recorder.run(func, input, weight, bias)

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            left, right = recorder.tokens(gradient, layout), recorder.tokens(kept[0], layout)
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
        raise _unknown(func, input, mat1, mat2)
    mat1 = _autocast(recorder, mat1, input, mat2)
    layout = _tokens_layout(recorder, mat1, input, mat2)
    output = recorder.run(func, input, mat1, mat2)

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            left, right = recorder.tokens(kept[0], layout), recorder.tokens(gradient, layout)
            yield mat2, Outer([(left, right)])
        if isinstance(input, Weight):
            yield recorder.dense(input, gradient, layout)

    return recorder.record(output, (mat1,) if isinstance(mat2, Weight) else (), contribute, input, mat2)


@rule(torch.matmul, Tensor.matmul, torch.mm, Tensor.mm)
def matmul(recorder: Recorder, func: Callable, input: Tensor, other: Tensor) -> Tensor:
    first = isinstance(input, Weight)
    weight, seen = (input, other) if first else (other, input)
    if isinstance(seen, Weight) or weight.dim() != 2 or seen.dim() < 2:
        raise _unknown(func, input, other)
    seen = _autocast(recorder, seen, weight)
    layout = recorder.layout(seen, weight)
    if layout.dim >= seen.dim() - (2 if first else 1):
        raise _unknown(func, input, other)
    output = recorder.run(func, input, seen) if first else recorder.run(func, seen, other)

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        if first:
            left, right = recorder.tokens(gradient.mT, layout), recorder.tokens(seen.mT, layout)
        else:
            left, right = recorder.tokens(seen, layout), recorder.tokens(gradient, layout)
        yield weight, Outer([(left, right)])

    return recorder.record(output, (seen,), contribute, weight)


@rule(torch.conv1d, torch.conv2d, torch.conv3d)
def convolution(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | str | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution is a linear layer over its unfolded patches."""
    input, layout = _convolution_input(recorder, func, input, weight, bias)
    output = recorder.run(func, input, weight, bias, stride, padding, dilation, groups)
    kernel = weight.shape[2:]
    stride, dilation = _tuple(stride, kernel), _tuple(dilation, kernel)
    if padding == "same":
        sides = [dilation * (size - 1) for size, dilation in zip(kernel, dilation, strict=True)]
        padding = [(side // 2, side - side // 2) for side in sides]
    else:
        padding = [(side, side) for side in _tuple(0 if padding == "valid" else padding, kernel)]

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            places = gradient.shape[2:]
            right = Patches(kept[0], recorder.samples, kernel, stride, padding, dilation, groups, places)
            yield weight, Outer([(_places(recorder, gradient, groups), right)])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, _channels(bias, gradient))

    return recorder.record(output, (input,) if isinstance(weight, Weight) else (), contribute, weight, bias)


@rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def transposed_convolution(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The adjoint of a convolution: its input and the output's gradient change places."""
    input, layout = _convolution_input(recorder, func, input, weight, bias)
    output = recorder.run(func, input, weight, bias, stride, padding, output_padding, groups, dilation)
    kernel = weight.shape[2:]
    stride, dilation = _tuple(stride, kernel), _tuple(dilation, kernel)
    padding = [(side, side) for side in _tuple(padding, kernel)]

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        if kept:
            places = kept[0].shape[2:]
            right = Patches(gradient, recorder.samples, kernel, stride, padding, dilation, groups, places)
            yield weight, Outer([(_places(recorder, kept[0], groups), right)])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, _channels(bias, gradient))

    return recorder.record(output, (input,) if isinstance(weight, Weight) else (), contribute, weight, bias)


# Tables


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


# Normalisations: what is scaled is computed again


@rule(torch.layer_norm)
def layer_norm(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    output = recorder.run(func, input, normalized_shape, weight, bias, eps, cudnn_enable)
    return _affine(recorder, input, output, lambda x: F.layer_norm(x, normalized_shape, eps=eps), weight, bias)


@rule(torch.rms_norm)
def rms_norm(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    output = recorder.run(func, input, normalized_shape, weight, eps)
    return _affine(recorder, input, output, lambda x: F.rms_norm(x, normalized_shape, eps=eps), weight, None)


@rule(torch.group_norm)
def group_norm(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    output = recorder.run(func, input, num_groups, weight, bias, eps, cudnn_enabled)
    return _affine(recorder, input, output, lambda x: F.group_norm(x, num_groups, eps=eps), weight, bias, True)


@rule(torch.batch_norm)
def batch_norm(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    refuse_batch_statistics(input, training=training)
    output = recorder.run(func, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    return _affine(
        recorder, input, output, lambda x: F.batch_norm(x, running_mean, running_var, eps=eps), weight, bias, True
    )


@rule(torch.instance_norm)
def instance_norm(
    recorder: Recorder,
    func: Callable,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if running_mean is not None and use_input_stats:
        refuse_batch_statistics(input, training=True)  # they enter the running statistics, as another batch would
    output = recorder.run(
        func, input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled
    )
    statistics = (None, None) if use_input_stats else (running_mean, running_var)

    def normalise(x: Tensor) -> Tensor:
        return F.instance_norm(x, *statistics, use_input_stats=use_input_stats, eps=eps)

    return _affine(recorder, input, output, normalise, weight, bias, True)


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
    """A weight in the mask: a bias by relative position."""
    if not isinstance(attn_mask, Weight) or any(isinstance(x, Weight) for x in (query, key, value)):
        raise _unknown(func, query, key, value, attn_mask)
    layout = recorder.layout(query, attn_mask)
    wide = recorder.spread(attn_mask, (*query.shape[:-1], key.shape[-2]), layout)
    return func(query, key, value, wide, *args, **kw)


# Element by element


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
                yield recorder.dense(weight, gradient if scale == 1 else gradient * scale, layout)

    return recorder.record(output, (), contribute, input, other)


@elementwise(torch.mul, Tensor.mul, Tensor.mul_)
def mul(recorder: Recorder, func: Callable, input: Any, other: Any) -> Tensor:
    weight, seen = (input, other) if isinstance(input, Weight) else (other, input)
    output = recorder.run(func, input, other)
    layout = _elementwise_layout(recorder, output, input, other)

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        yield recorder.dense(weight, gradient * seen, layout)

    return recorder.record(output, (seen,), contribute, weight)


@elementwise(torch.div, Tensor.div, Tensor.div_, torch.true_divide, Tensor.true_divide)
def div(recorder: Recorder, func: Callable, input: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        raise _unknown(func, input, other)
    output = recorder.run(func, input, other)
    layout = _elementwise_layout(recorder, output, input, other)
    if isinstance(input, Weight):
        weight, seen = input, other
    else:
        weight, seen = other, input

    def contribute(seen: Tensor, gradient: Tensor) -> Iterator[Contribution]:
        terms = gradient / seen if weight is input else -gradient * seen / weight.plain.detach().square()
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
        shape = _channels(weight, gradient) if weight.numel() > 1 else None
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
        raise _unknown(func, *weights)
    [layout] = layouts

    def contribute(gradient: Tensor) -> Iterator[Contribution]:
        start = 0
        for x in tensors:
            if isinstance(x, Weight):
                yield recorder.dense(x, gradient.narrow(dim, start, x.shape[dim]), layout)
            start += x.shape[dim]

    return recorder.record(output, (), contribute, *weights)


# Helpers


def _affine(
    recorder: Recorder,
    input: Tensor,
    output: Tensor,
    normalise: Callable[[Tensor], Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: bool = False,
) -> Tensor:
    """Scale and shift, feature by feature (the last dimensions) or by channel (the second), of `normalise(input)`."""
    layout = recorder.layout(input, weight, bias)

    def contribute(*kept_and_gradient: Tensor) -> Iterator[Contribution]:
        *kept, gradient = kept_and_gradient
        shape = [None if x is None or not channels else _channels(x, gradient) for x in (weight, bias)]
        if kept:
            seen = normalise(kept[0].to(torch.promote_types(kept[0].dtype, torch.float32)))
            yield recorder.dense(weight, seen.mul_(gradient), layout, shape[0])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, shape[1])

    return recorder.record(output, (input,) if isinstance(weight, Weight) else (), contribute, weight, bias)


def _elementwise_layout(recorder: Recorder, output: Tensor, *inputs: Any) -> Layout:
    weights = [x for x in inputs if isinstance(x, Weight)]
    for x in inputs:
        if isinstance(x, Tensor) and not isinstance(x, Weight) and recorder.tracker.depends_on_batch(x):
            layout = recorder.layout(x, *weights)
            return layout._replace(dim=layout.dim + output.dim() - x.dim())
    raise _unknown(torch.add, *weights)


def _tokens_layout(recorder: Recorder, input: Tensor, *weights: Any) -> Layout:
    layout = recorder.layout(input, *weights)
    if layout.dim >= input.dim() - 1:
        raise InputError(
            f"{', '.join(_weight_names(weights))}: expected the batch first and features last, got {tuple(input.shape)}"
        )
    return layout


def _convolution_input(
    recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Layout]:
    input = _autocast(recorder, input, weight, bias)
    layout = recorder.layout(input, weight, bias)
    whole = len(input) == recorder.tracker.rows * layout.inner
    if layout.dim or not whole or input.dim() != weight.dim():
        raise InputError(
            f"{', '.join(_weight_names([weight, bias]))}: expected the batch first in a convolution, "
            f"{recorder.tracker.rows} rows, got {tuple(input.shape)}"
        )
    return input, layout


def _places(recorder: Recorder, tensor: Tensor, groups: int) -> Tensor:
    """[B·J, C, *space] -> [B, groups, J·L, C/groups]."""
    split = tensor.flatten(2).unflatten(0, (recorder.samples, -1)).unflatten(2, (groups, -1))  # [B, J, g, c, L]
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _channels(weight: Tensor, output: Tensor) -> tuple[int, ...]:
    return (weight.numel(), *[1] * (output.dim() - 2))


def _autocast(recorder: Recorder, input: Tensor, *others: Any) -> Tensor:
    """The precision in which a matrix product under autocast sees its input."""
    device = input.device.type
    if isinstance(input, Weight) or not torch.is_autocast_enabled(device) or not input.is_floating_point():
        return input
    with recorder.tracker:
        return input.to(torch.get_autocast_dtype(device))


def _tuple(value: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


def _weight_names(weights: Sequence[Any]) -> list[str]:
    return sorted({f"parameter {name}" for x in weights if isinstance(x, Weight) for name in x.sources})


def _unknown(func: Callable, *weights: Any) -> InputError:
    name = getattr(func, "__name__", str(func))
    return InputError(f"{', '.join(_weight_names(weights))}: no per-sample gradient rule for this use in {name}")


__all__ = ["BATCH_FIRST", "RULES", "rule"]

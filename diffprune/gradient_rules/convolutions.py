"""Rules for convolutions: linear layers over their unfolded patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffprune.batch_layout import Layout
from diffprune.errors import InputError
from diffprune.gradient_parts import Outer, Patches
from diffprune.gradient_rules.registry import autocast, channel_shape, rule, weight_names
from diffprune.weight_tensors import Contribution, Recorder, Weight


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
            right = Patches(kept[0].conj(), recorder.samples, kernel, stride, padding, dilation, groups, places)
            yield weight, Outer([(_places(recorder, gradient, groups), right)])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, channel_shape(bias, gradient))

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
            yield weight, Outer([(_places(recorder, kept[0].conj(), groups), right)])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, channel_shape(bias, gradient))

    return recorder.record(output, (input,) if isinstance(weight, Weight) else (), contribute, weight, bias)


def _convolution_input(
    recorder: Recorder, func: Callable, input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Layout]:
    input = autocast(recorder, input, weight, bias)
    layout = recorder.layout(input, weight, bias)
    whole = len(input) == recorder.tracker.rows * layout.inner
    if layout.dim or not whole or input.dim() != weight.dim():
        raise InputError(
            f"{', '.join(weight_names([weight, bias]))}: expected the batch first in a convolution, "
            f"{recorder.tracker.rows} rows, got {tuple(input.shape)}"
        )
    return input, layout


def _places(recorder: Recorder, tensor: Tensor, groups: int) -> Tensor:
    """[B·J, C, *space] -> [B, groups, J·L, C/groups]."""
    split = tensor.flatten(2).unflatten(0, (recorder.samples, -1)).unflatten(2, (groups, -1))  # [B, J, g, c, L]
    return split.permute(0, 2, 1, 4, 3).flatten(2, 3)


def _tuple(value: int | Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values

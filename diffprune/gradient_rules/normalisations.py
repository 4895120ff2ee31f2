"""Rules for normalisations: what the weight scales is computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_tracker import refuse_batch_statistics
from diffprune.gradient_rules.registry import channel_shape, rule
from diffprune.weight_tensors import Contribution, Recorder, Weight


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
        shape = [None if x is None or not channels else channel_shape(x, gradient) for x in (weight, bias)]
        if kept:
            seen = normalise(kept[0].to(torch.promote_types(kept[0].dtype, torch.float32)))
            yield recorder.dense(weight, seen.mul_(gradient), layout, shape[0])
        if isinstance(bias, Weight):
            yield recorder.dense(bias, gradient, layout, shape[1])

    return recorder.record(output, (input,) if isinstance(weight, Weight) else (), contribute, weight, bias)

"""The registry of rules, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffprune.composites import name_of
from diffprune.weight_tensors import NoRule, Recorder, Weight

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


def autocast(recorder: Recorder, input: Tensor, *others: Any) -> Tensor:
    """The precision in which a matrix product under autocast sees its input."""
    device = input.device.type
    if isinstance(input, Weight) or not torch.is_autocast_enabled(device) or not input.is_floating_point():
        return input
    with recorder.tracker:
        return input.to(torch.get_autocast_dtype(device))


def beside(recorder: Recorder, func: Callable, weight: Weight, seen: Tensor) -> Tensor:
    """A weight [..., R, C] with as many matrices as what it meets, as a tensor that depends on the samples."""
    layout = recorder.layout(seen, weight)
    if weight.dim() != seen.dim() or layout.dim >= seen.dim() - 2:
        raise unknown(func, weight)
    shape = [*weight.shape]
    shape[layout.dim] = seen.shape[layout.dim]
    return recorder.spread(weight, shape, layout)


def channel_shape(weight: Tensor, output: Tensor) -> tuple[int, ...]:
    return (weight.numel(), *[1] * (output.dim() - 2))


def unknown(func: Callable, *weights: Any) -> NoRule:
    """A use that the rule does not cover: refused, or mapped over the samples."""
    return NoRule(f"{', '.join(weight_names(weights))}: no per-sample gradient rule for this use in {name_of(func)}")


def weight_names(weights: Sequence[Any]) -> list[str]:
    return sorted({f"parameter {name}" for x in weights if isinstance(x, Weight) for name in x.sources})

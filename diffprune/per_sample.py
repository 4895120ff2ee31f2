"""Per-sample gradient norms and dot products of any module, from one forward and one backward of a batch.

The gradient of a linear layer for one sample is the product of what the layer saw and of the gradient of what it
returned, summed over the sample's tokens. Its norm, or its dot product with a given matrix, needs no weight-sized
tensor per sample (Goodfellow, arXiv 1510.01799; for tokens the Gram form: Rochette et al., arXiv 1912.06015).
`per_sample_gradients` records both during an ordinary forward and backward; a `Rule` per kind of layer does the sums
(`gradient_rules.py`).

    with per_sample_gradients(model) as grads:
        loss(model(x)).sum().backward()
    grads.sqnorm  # [B] float64
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from diffprune.errors import InputError
from diffprune.gradient_rules import RULES, Rule


@contextmanager
def per_sample_gradients(
    model: nn.Module,
    norm: bool = True,
    direction: Mapping[str, Tensor] | Literal["total"] | None = None,
    rows_per_sample: int = 1,
    weight_gradients: bool = False,
    total: bool = False,
) -> Iterator[PerSampleGradients]:
    """Record, for each sample of a batch, the squared norm of its gradient and its dot product with a direction.

    Inside the block run one forward (which may call a layer many times) and one backward of the sum of the samples'
    losses. Gradients are over all trainable parameters of `model`. The first dimension of what a layer gets and
    returns must be the batch, and the loss of a sample may depend on its own rows only.

    Args:
        model: every trainable parameter must belong to a layer that a rule covers (`gradient_rules.RULES`).
        norm: compute `sqnorm` and `by_layer`.
        direction: compute `dot` with this: a tensor for each trainable parameter, by its name in
            `model.named_parameters()`. "total": with the batch's own Σ_i g_i, in the same pass.
        rows_per_sample: J. Rows i·J ... i·J+J-1 are one sample, whose gradient is the sum over its rows.
        weight_gradients: also leave the batch's gradients in the parameters' `.grad`, as without this block. By
            default they are not computed, which saves a third of the backward.
        total: compute `total`.

    Yields: `PerSampleGradients`, to be read once the backward has run, in the block or after it.

    Raises: InputError that names the parameter or layer: at entry for a parameter without a rule, or a direction that
        does not fit; inside for rows that do not fit, an input changed in place, a parameter used elsewhere than in
        its layer, a second backward; on exit if no backward ran.
    """
    if not norm and direction is None and not total:
        raise InputError("per_sample_gradients: nothing to compute, expected norm, direction or total")
    if rows_per_sample < 1:
        raise InputError(f"per_sample_gradients: expected rows_per_sample >= 1, got {rows_per_sample}")
    layers = _covered_layers(model)
    if direction is not None and direction != "total":
        _set_direction(layers, direction)
    grads = PerSampleGradients(layers, norm, direction is not None, total or direction == "total", rows_per_sample)
    with _hooks(layers, grads, weight_gradients):
        yield grads
        grads._finish()


class PerSampleGradients:
    """What `per_sample_gradients` found. Tensors are float64, on the model's device."""

    def __init__(self, layers: list[_Layer], norm: bool, dot: bool, total: bool, rows_per_sample: int) -> None:
        self._layers, self._norm, self._dot, self._total = layers, norm, dot, total
        self._rows_per_sample = rows_per_sample
        self._rows: tuple[int, _Layer] | None = None  # rows of the batch, and the layer that saw them first
        self._fired = self._closed = False

    @property
    def sqnorm(self) -> Tensor:
        """[B]: ‖g_i‖² over all trainable parameters."""
        return _sum_in_order(self.by_layer.values())

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Name of the module that owns the parameters -> [B], its part of `sqnorm`."""
        if not self._norm:
            raise InputError("per_sample_gradients: norms were not asked for (norm=False)")
        self._finish()
        return {layer.name: layer.sqnorm for layer in self._layers}

    @property
    def dot(self) -> Tensor:
        """[B]: ⟨g_i, direction⟩ over all trainable parameters."""
        if not self._dot:
            raise InputError("per_sample_gradients: dot products were not asked for (direction=None)")
        self._finish()
        return _sum_in_order(layer.dot for layer in self._layers)

    @property
    def total(self) -> dict[str, Tensor]:
        """Name of the parameter -> Σ_i g_i, of its shape, summed in float64.

        A batch's own weight gradient is summed in float32, so that it depends on how samples are grouped into batches.
        """
        if not self._total:
            raise InputError("per_sample_gradients: the total was not asked for (total=False)")
        self._finish()
        return {layer.full_names[key]: value for layer in self._layers for key, value in layer.total.items()}

    def _forward_ran(self, layer: _Layer, module: nn.Module, input: Tensor, output: Tensor) -> None:
        if layer.done:
            raise InputError(f"{layer} ran again after its backward: expected one forward, then one backward")
        if self._rows is None:
            self._rows = (len(input), layer)
        rows, first = self._rows
        if input.dim() < layer.rule.min_dim(module) or len(input) != rows or len(output) != rows:
            raise InputError(f"{layer}: expected the batch first, {rows} rows as in {first}, got {tuple(input.shape)}")
        if rows % self._rows_per_sample:
            raise InputError(f"{layer}: expected a multiple of {self._rows_per_sample} rows, got {rows}")
        call = _Call(module, input.detach(), input._version)
        layer.calls.append(call)
        output.register_hook(lambda gradient: self._backward_ran(layer, call, gradient))

    def _backward_ran(self, layer: _Layer, call: _Call, gradient: Tensor) -> None:
        if self._closed or layer.done:
            raise InputError(f"{layer}: a backward after its sums were made: expected one backward, in the block")
        if call.input._version != call.version:
            raise InputError(f"{layer}: its input was changed in place after it ran")
        call.gradient = gradient.detach()
        self._fired = True
        if all(other.gradient is not None for other in layer.calls):
            self._sum(layer)

    def _finish(self) -> None:
        if not self._fired:
            raise InputError("per_sample_gradients: expected a forward and a backward in the block, found none")
        for layer in self._layers:
            if not layer.done:
                self._sum(layer)

    @torch.no_grad()
    def _sum(self, layer: _Layer) -> None:
        """All calls of a layer are summed before the norm is taken; a call without a gradient adds nothing."""
        samples = self._rows[0] // self._rows_per_sample
        tokens = [
            layer.rule.tokens(call.module, call.input, call.gradient)
            for call in layer.calls
            if call.gradient is not None
        ]
        if tokens:
            seen, gradient = tokens[0]
            if len(tokens) > 1:
                seen, gradient = (torch.cat(parts, dim=1) for parts in zip(*tokens, strict=True))
            seen, gradient = (x.reshape(samples, -1, *x.shape[2:]) for x in (seen, gradient))
            if self._norm:
                layer.sqnorm = layer.rule.sqnorm(seen, gradient, layer.parameters.keys()).double()
            if self._total:
                sums = layer.rule.total(seen, gradient, layer.parameters)
                layer.total = {key: sums[key].reshape(value.shape) for key, value in layer.parameters.items()}
            if self._dot:
                direction = layer.direction or {key: layer.total[key].to(p) for key, p in layer.parameters.items()}
                layer.dot = layer.rule.dot(seen, gradient, direction).double()
        else:
            layer.total = {key: torch.zeros_like(p, dtype=torch.float64) for key, p in layer.parameters.items()}
            layer.sqnorm = layer.dot = next(iter(layer.total.values())).new_zeros(samples)
        for call in layer.calls:  # the graph holds on to the call: let go of what is large
            call.input = call.gradient = None
        layer.calls, layer.done = [], True


def _sum_in_order(values: Iterable[Tensor]) -> Tensor:
    """One after the other: torch.sum's order of a column depends on how many columns there are."""
    return reduce(torch.add, values)


@dataclass
class _Call:
    module: nn.Module
    input: Tensor | None
    version: int
    gradient: Tensor | None = None


@dataclass(eq=False)
class _Layer:
    """One set of parameters, and the module that owns it, or the modules that share all of it."""

    name: str
    rule: Rule
    parameters: dict[str, nn.Parameter]  # the trainable ones, by their names in the module
    full_names: dict[str, str]  # name in the module -> name in the model
    modules: list[nn.Module] = field(default_factory=list)
    direction: dict[str, Tensor] = field(default_factory=dict)
    calls: list[_Call] = field(default_factory=list)
    sqnorm: Tensor | None = None
    dot: Tensor | None = None
    total: dict[str, Tensor] = field(default_factory=dict)
    done: bool = False

    def __str__(self) -> str:
        return f"layer {self.name or '(the model itself)'} ({type(self.modules[0]).__name__})"


def _covered_layers(model: nn.Module) -> list[_Layer]:
    full_names = {parameter: name for name, parameter in model.named_parameters()}
    layers: list[_Layer] = []
    owners: dict[nn.Parameter, _Layer] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in module.named_parameters(recurse=False) if value.requires_grad}
        if not own:
            continue
        rule = RULES.get(type(module))
        strangers = [key for key in own if rule is None or key not in ("weight", "bias")]
        if strangers:
            raise InputError(
                f"parameter {full_names[own[strangers[0]]]}: no per-sample gradient rule for it in a "
                f"{type(module).__name__}; there are rules for {', '.join(kind.__name__ for kind in RULES)}"
            )
        reason = rule.refusal(module)
        if reason:
            raise InputError(f"layer {name} ({type(module).__name__}): {reason}, got {module}")
        shared = [owners[value] for value in own.values() if value in owners]
        layer = shared[0] if shared else _Layer(name, rule, own, {k: full_names[v] for k, v in own.items()})
        if shared and (layer.rule is not rule or _identities(layer.parameters) != _identities(own)):
            raise InputError(
                f"layer {name} ({type(module).__name__}) shares a parameter with {layer}: expected two layers of one "
                "kind that share all of their trainable parameters"
            )
        if not shared:
            layers.append(layer)
        layer.modules.append(module)
        owners.update(dict.fromkeys(own.values(), layer))
    if not layers:
        raise InputError(f"{type(model).__name__}: no trainable parameter")
    return layers


def _identities(parameters: Mapping[str, nn.Parameter]) -> dict[str, int]:
    return {key: id(value) for key, value in parameters.items()}


def _set_direction(layers: list[_Layer], direction: Mapping[str, Tensor]) -> None:
    for layer in layers:
        for key, parameter in layer.parameters.items():
            name = layer.full_names[key]
            found = tuple(direction[name].shape) if name in direction else None
            if found != parameter.shape:
                raise InputError(f"direction: expected {name} {tuple(parameter.shape)}, got {found or 'none'}")
            layer.direction[key] = direction[name].detach().to(parameter)
    strangers = direction.keys() - {name for layer in layers for name in layer.full_names.values()}
    if strangers:
        raise InputError(f"direction: {min(strangers)} is no trainable parameter of the model")


@contextmanager
def _hooks(layers: list[_Layer], grads: PerSampleGradients, weight_gradients: bool) -> Iterator[None]:
    """While a covered layer's forward runs, it sees stand-ins that share its parameters' memory.

    So the backward computes no weight gradient that nobody wants, and a gradient that still reaches a parameter
    itself can only come from a use outside of its layer, which would be missing from the sums: that is an error.
    """
    handles = []
    try:
        for layer in layers:
            stand_ins = {key: _stand_in(value, weight_gradients) for key, value in layer.parameters.items()}
            for key, parameter in layer.parameters.items():
                handles.append(parameter.register_hook(_refuse_use_outside(layer, layer.full_names[key])))
            for module in layer.modules:
                before, after = _module_hooks(layer, stand_ins, grads)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True))
        yield
    finally:
        grads._closed = True
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.calls = []
            for module in layer.modules:
                module._parameters.update(layer.parameters)


def _module_hooks(layer: _Layer, stand_ins: dict[str, Tensor], grads: PerSampleGradients) -> tuple[Callable, Callable]:
    def before(module, args):
        module._parameters.update(stand_ins)

    def after(module, args, kwargs, output):
        module._parameters.update(layer.parameters)
        if output is None or not torch.is_grad_enabled():  # None: the forward raised
            return None
        if not output.requires_grad:  # nothing upstream does: start the graph here
            output = output.requires_grad_().clone()
        grads._forward_ran(layer, module, args[0] if args else next(iter(kwargs.values())), output)
        return output

    return before, after


def _stand_in(parameter: nn.Parameter, weight_gradients: bool) -> Tensor:
    stand_in = parameter.detach()
    if weight_gradients:

        def hand_over(_: Tensor) -> None:
            parameter.grad = stand_in.grad if parameter.grad is None else parameter.grad + stand_in.grad
            stand_in.grad = None

        stand_in.requires_grad_().register_post_accumulate_grad_hook(hand_over)
    return stand_in


def _refuse_use_outside(layer: _Layer, name: str) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        raise InputError(f"parameter {name}: used outside of the forward of {layer}, which no rule covers")

    return hook

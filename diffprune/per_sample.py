"""Per-sample gradient norms and dot products of any module, from one forward and one backward of a batch.

The gradient of a linear layer for one sample is the product of what the layer saw and of the gradient of what it
returned, summed over the sample's tokens. Its norm, or its dot product with a given matrix, needs no weight-sized
tensor per sample (Goodfellow, arXiv 1510.01799; for tokens the Gram form: Rochette et al., arXiv 1912.06015).
`per_sample_gradients` lets the model run on stand-ins for its parameters (`weight_tensors.py`), which see every torch
function that a parameter enters, in whatever module; `gradient_rules/` has a rule per function, and
`gradient_parts.py` does the sums.

    with per_sample_gradients(model) as grads:
        loss(model(x)).sum().backward()
    grads.sqnorm  # [B] float64
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffprune.errors import InputError
from diffprune.gradient_rules import RULES
from diffprune.weight_tensors import ParameterUse, Recorder, Wanted, Weight

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def per_sample_gradients(
    model: nn.Module,
    norm: bool = True,
    direction: Mapping[str, Tensor] | Literal["total"] | None = None,
    rows_per_sample: int = 1,
    weight_gradients: bool = False,
    total: bool = False,
    fallback: str | None = None,
) -> Iterator[PerSampleGradients]:
    """Record, for each sample of a batch, the squared norm of its gradient and its dot product with a direction.

    Inside the block run one forward (which may call a layer many times, checkpoint blocks, or run under autocast) and
    one backward of the sum of the samples' losses. Gradients are over all trainable parameters of `model`. Samples are
    the first dimension of what the model gets, and the loss of a sample may depend on its own rows only. A compiled
    model runs as it was before it was compiled.

    Args:
        model: its trainable parameters are float16, bfloat16, float32 or float64. Its mode stays as it is.
        norm: compute `sqnorm` and `by_layer`.
        direction: compute `dot` with this: a tensor for each trainable parameter, by its name in
            `model.named_parameters()`. "total": with the batch's own Σ_i g_i, in the same pass.
        rows_per_sample: J. Rows i·J ... i·J+J-1 are one sample, whose gradient is the sum over its rows.
        weight_gradients: also leave the batch's gradients in the parameters' `.grad`, as without this block but for
            hooks on parameters. By default they are not computed, which saves a third of the backward. Under
            DistributedDataParallel they would be one process's own: take its `no_sync()` around, and average them.
        total: compute `total`.
        fallback: "vmap" maps a torch function that takes a parameter and has no rule over the samples, at the price of
            a copy of that parameter's gradient per sample. None refuses it.

    Yields: `PerSampleGradients`, to be read once the backward has run, in the block or after it.

    Raises: InputError that names the parameter: at entry for a dtype without gradients or a direction that does not
        fit; inside for a use that no rule covers, a batch that is empty, cannot be found or mixes samples (BatchNorm in
        training mode), an input changed in place, a second backward, `torch.autograd.grad`, forward-mode and
        `torch.func` differentiation; on exit if no backward ran.
    """
    if not norm and direction is None and not total:
        raise InputError("per_sample_gradients: nothing to compute, expected norm, direction or total")
    if rows_per_sample < 1:
        raise InputError(f"per_sample_gradients: expected rows_per_sample >= 1, got {rows_per_sample}")
    if fallback not in (None, "vmap"):
        raise InputError(f"per_sample_gradients: expected fallback None or 'vmap', got {fallback!r}")
    uses = _parameter_uses(model)
    if weight_gradients and any(_reduces(module) for module in model.modules()):
        raise InputError(_NOT_AVERAGED)
    if direction is not None and direction != "total":
        _set_direction(uses, direction)
    wanted = Wanted(norm, total or direction == "total", direction == "total")
    recorder = Recorder(RULES, wanted, rows_per_sample, weight_gradients, fallback)
    grads = PerSampleGradients(uses, recorder, norm, direction is not None, wanted.total)
    with _stand_ins(model, uses, recorder):
        yield grads
        grads._finish()


class PerSampleGradients:
    """What `per_sample_gradients` found. Tensors are float64, on the model's device."""

    def __init__(self, uses: list[ParameterUse], recorder: Recorder, norm: bool, dot: bool, total: bool) -> None:
        self._uses, self._recorder = uses, recorder
        self._norm, self._dot, self._total = norm, dot, total

    @property
    def sqnorm(self) -> Tensor:
        """[B]: ‖g_i‖² over all trainable parameters."""
        return _sum_in_order(self.by_layer.values())

    @property
    def by_layer(self) -> dict[str, Tensor]:
        """Name of the module that owns the parameters -> [B], its part of `sqnorm`.

        A shared parameter belongs to the first module that has it, as in `named_parameters`.
        """
        if not self._norm:
            raise InputError("per_sample_gradients: norms were not asked for (norm=False)")
        self._finish()
        layers: dict[str, Tensor] = {}
        for use in self._uses:
            layers[use.owner] = layers[use.owner] + use.sums.sqnorm if use.owner in layers else use.sums.sqnorm
        return layers

    @property
    def dot(self) -> Tensor:
        """[B]: ⟨g_i, direction⟩ over all trainable parameters."""
        if not self._dot:
            raise InputError("per_sample_gradients: dot products were not asked for (direction=None)")
        self._finish()
        return _sum_in_order(use.sums.dot for use in self._uses)

    @property
    def total(self) -> dict[str, Tensor]:
        """Name of the parameter -> Σ_i g_i, of its shape, summed over samples in float64.

        A batch's own weight gradient is summed in float32, so that it depends on how samples are grouped into batches.
        """
        if not self._total:
            raise InputError("per_sample_gradients: the total was not asked for (total=False)")
        self._finish()
        return {use.name: use.sums.total.view(use.parameter.shape) for use in self._uses}

    def _finish(self) -> None:
        if not self._recorder.fired:
            raise InputError("per_sample_gradients: expected a forward and a backward in the block, found none")
        for use in self._uses:
            self._recorder.finish(use)
        found = {len(one): use.name for use in self._uses for one in (use.sums.sqnorm, use.sums.dot) if one is not None}
        if len(found) > 1:
            counts = " and ".join(f"{count} at {name}" for count, name in sorted(found.items()))
            raise InputError(
                f"per_sample_gradients: the number of samples is not one: {counts}; call the model itself, with the "
                "batch as the first dimension of its first tensor"
            )


def _sum_in_order(values: Iterable[Tensor]) -> Tensor:
    """One after the other: torch.sum's order of a column depends on how many columns there are."""
    return reduce(torch.add, values)


def _parameter_uses(model: nn.Module) -> list[ParameterUse]:
    uses = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or type(model).__name__}: is scripted, expected a module whose code runs in Python"
            )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "placements"):
            raise InputError(f"parameter {name}: is a DTensor, expected a tensor that is whole on one device")
        if parameter.dtype not in _DTYPES:
            raise InputError(
                f"parameter {name}: expected {', '.join(str(x).removeprefix('torch.') for x in _DTYPES)}, got "
                f"{parameter.dtype}, which has no gradient here"
            )
        uses.append(ParameterUse(name, name.rpartition(".")[0], parameter, parameter.detach().requires_grad_()))
    if not uses:
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
        raise InputError(
            f"{type(model).__name__}: no trainable parameter; its parameters are {', '.join(dtypes) or 'none'}"
        )
    return uses


def _set_direction(uses: list[ParameterUse], direction: Mapping[str, Tensor]) -> None:
    for use in uses:
        found = tuple(direction[use.name].shape) if use.name in direction else None
        if found != use.parameter.shape:
            raise InputError(f"direction: expected {use.name} {tuple(use.parameter.shape)}, got {found or 'none'}")
        dtype = torch.promote_types(use.parameter.dtype, torch.float32)
        use.direction = direction[use.name].detach().to(use.parameter.device, dtype)
    strangers = direction.keys() - {use.name for use in uses}
    if strangers:
        raise InputError(f"direction: {min(strangers)} is no trainable parameter of the model")


@contextmanager
def _stand_ins(model: nn.Module, uses: list[ParameterUse], recorder: Recorder) -> Iterator[None]:
    """The model's modules have weights in place of their parameters.

    So the backward computes no weight gradient that nobody wants, and a gradient that still reaches a parameter itself
    can only come from a use past the stand-ins, which would be missing from the sums: that is an error.
    """
    weights = {use.parameter: Weight.make(use.leaf, recorder, {use.name: use}) for use in uses}
    places = [
        (module, key, parameter)
        for module in model.modules()
        for key, parameter in module._parameters.items()
        if parameter in weights
    ]

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if module is model:
            _check_wrapper(recorder)
        recorder.tracker.enter(module, (args, kwargs), module is model)

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        recorder.tracker.leave(module)

    with ExitStack() as stack:
        try:
            for use in uses:
                hook = use.parameter.register_hook(_refuse_use_past_stand_in(use))
                stack.callback(hook.remove)
                recorder.tracker.add_parameter(use.name, use.parameter)
            for module in model.modules():
                if isinstance(module, DistributedDataParallel):
                    stack.enter_context(_without_reducer(module))
                hook = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(hook.remove)
                hook = module.register_forward_hook(leave, always_call=True)
                stack.callback(hook.remove)
            for tensor in (*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)):
                recorder.tracker.add_constant(tensor)
            if "torch._dynamo" in sys.modules:  # compiled code would not see the stand-ins
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module, key, parameter in places:
                module._parameters[key] = weights[parameter]
            with recorder.tracker:
                yield
        finally:
            recorder.closed = True
            for module, key, parameter in places:
                module._parameters[key] = parameter


_NOT_AVERAGED = (
    "per_sample_gradients: weight_gradients under DistributedDataParallel would be those of this process alone, and "
    "the processes' models would drift apart; do this under the model's no_sync() and average .grad over the processes"
)


def _reduces(module: nn.Module) -> bool:
    return isinstance(module, DistributedDataParallel) and module.require_backward_grad_sync


@contextmanager
def _without_reducer(model: DistributedDataParallel) -> Iterator[None]:
    """The reducer hears nothing of the block: with `static_graph` it would take it for the first training step, find
    every parameter unused, and never reduce one."""
    synced = model.require_forward_param_sync  # else buffers would miss one broadcast
    first = model.static_graph and not model._static_graph_delay_allreduce_enqueued
    with model.no_sync():
        if first:
            model._static_graph_delay_allreduce_enqueued = True
        try:
            yield
        finally:
            model.require_forward_param_sync = synced
            if first:
                model._static_graph_delay_allreduce_enqueued = False


def _check_wrapper(recorder: Recorder) -> None:
    """InputError if the model is called by a wrapper that the block was not given, and that counts on its backward."""
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    if recorder.weight_gradients and _reduces(wrapper):
        raise InputError(_NOT_AVERAGED)
    if wrapper.static_graph:
        raise InputError(
            "per_sample_gradients: the model is called through DistributedDataParallel(static_graph=True), which would "
            "take this for a training step; give the wrapper to per_sample_gradients, or call the model itself"
        )


def _refuse_use_past_stand_in(use: ParameterUse) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        raise InputError(
            f"parameter {use.name}: used past its module (by a reference that was taken earlier), which no rule sees"
        )

    return hook

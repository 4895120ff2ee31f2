"""The stand-ins that a model's parameters are replaced by while per-sample gradients are recorded.

A `Weight` is a trainable parameter, or what was computed from parameters and constants alone (a slice, a cast, a table
looked up at fixed positions). Where a torch function brings a `Weight` and the samples together, a rule for that
function (`gradient_rules/`) takes over: it runs the function on weights that ask for no gradient, and says what
part the use has in each sample's gradient. A function without a rule is refused, or mapped over the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffprune.autograd_nodes import Keep, Start, forget_gradient, node_of
from diffprune.batch_layout import BATCH_FIRST, Layout, batch_first, map_tensors, tensors_in
from diffprune.batch_tracker import BatchTracker
from diffprune.composites import body, is_composite, looked_into, name_of
from diffprune.errors import InputError
from diffprune.gradient_parts import Aligned, Dense, Part, PartSums, Through, part_sums
from diffprune.kernels.tangents import carries_tangent
from diffprune.sample_maps import map_over_samples
from diffprune.weight_routes import Route, expands, route

Contribution = tuple["Weight", Part]


_GRADIENT = (Tensor.grad.__get__, Tensor.grad.__set__, Tensor.grad.__delete__)


class Weight(Tensor):
    """See the module. Its memory is the parameter's; `plain` is the tensor itself, for autograd among parameters."""

    plain: Tensor
    recorder: Recorder
    sources: dict[str, ParameterUse]  # the parameters it was computed from
    parent: Weight | None = None
    route: Route | None = None
    expanded: Weight | None = None  # what it was expanded from, along a first dimension of size 1

    @staticmethod
    def make(plain: Tensor, recorder: Recorder, sources: dict[str, ParameterUse]) -> Weight:
        weight = Tensor._make_subclass(Weight, plain.detach(), True)
        weight.plain, weight.recorder, weight.sources = plain, recorder, sources
        for leaf in (weight, plain) if plain.is_leaf else (weight,):
            with torch._C.DisableTorchFunctionSubclass():
                leaf.register_post_accumulate_grad_hook(_refuse_gradient(list(sources), recorder.tracker))
        return weight

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        recorder = next(x for x in tensors_in((args, kwargs)) if isinstance(x, Weight)).recorder
        return recorder.call(func, args, kwargs)


@dataclass(eq=False)
class ParameterUse:
    """A trainable parameter and what has been recorded of it."""

    name: str
    owner: str  # the name of the first module that has it
    parameter: nn.Parameter
    leaf: Tensor
    direction: Tensor | None = None
    expected: int = 0  # calls before the backward, without autograd too: the first run of a checkpointed block
    fired: int = 0
    parts: list[Part] = field(default_factory=list)
    sums: PartSums | None = None


class Wanted(NamedTuple):
    """What is to be found beside dot products with given directions."""

    norm: bool
    total: bool
    dot_with_total: bool


class NoRule(InputError):
    """Raised by a rule for a use that it does not cover."""


class _Call:
    """One run of a rule: what it keeps for its backward, and the backward."""

    def __init__(self, kept: Tensor | None, contribute: Callable, sources: set[ParameterUse]) -> None:
        self.kept = kept  # the tensor: its grad_fn alone does not keep what it saved, in PyTorch 2.11
        self.contribute, self.sources = contribute, sources


class Recorder:
    """Runs torch functions on weights, and collects the parts of each parameter's gradient."""

    def __init__(
        self,
        rules: dict[Callable, Callable],
        wanted: Wanted,
        rows_per_sample: int,
        weight_gradients: bool,
        fallback: str | None,
    ) -> None:
        self.rules, self.wanted, self.rows_per_sample = rules, wanted, rows_per_sample
        self.weight_gradients, self.fallback = weight_gradients, fallback
        self.tracker = BatchTracker(neutral=Weight, final=rules.__contains__)
        self.fired = self.closed = False
        self._anchor = torch.empty(0, requires_grad=True)

    # What rules call

    def run(self, func: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """`func` with tensors in place of weights. The result requires grad."""
        usable = self._usable
        if getattr(func, "__name__", "").endswith("_") and not isinstance(args[0], Weight):
            usable = self._requiring  # in place, of a tensor that has to require grad from here on
        args, kwargs = map_tensors(usable, args), map_tensors(usable, kwargs)
        if not any(x.requires_grad for x in tensors_in((args, kwargs))):  # start the graph here
            return Start.apply(self._anchor, lambda: func(*args, **kwargs))
        return func(*args, **kwargs)

    def record(
        self, output: Tensor, kept: Sequence[Tensor], contribute: Callable[..., Iterable[Contribution]], *weights: Any
    ) -> Tensor:
        """Once `output` has its gradient g, `contribute(*kept, g)` is asked for the part of each of `weights`."""
        sources = {source for weight in weights if isinstance(weight, Weight) for source in weight.sources.values()}
        for source in sources:
            source.expected += not self.tracker.backward_began
        saved = Keep.apply(self._anchor, *(tensor.detach() for tensor in kept)) if kept else None
        call = _Call(saved, contribute, sources)
        node, part = node_of(output)

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            gradient = gradients[output_nr]
            if gradient is not None:
                self._backward_ran(call, part(gradient))

        output_nr = output.output_nr if node is output.grad_fn else 0
        node.register_prehook(hook)  # runs after the hooks of the tensor, whenever they were registered
        return output

    def layout(self, tensor: Tensor, *weights: Any) -> Layout:
        """Where the batch is in `tensor`; an error that names the weights if that is not known."""
        layout = self.tracker.layout(tensor)
        rows = self.tracker.rows
        if layout is None:
            raise InputError(
                f"{_names(weights)}: expected the batch first, {rows} rows, in what it meets, got {tuple(tensor.shape)}"
            )
        if rows % self.rows_per_sample:
            raise InputError(f"{_names(weights)}: expected a multiple of {self.rows_per_sample} rows, got {rows}")
        return layout

    def refuse_mixed(self, tensors: list[Tensor], *weights: Any) -> None:
        """Tensors that are broadcast together with weights have the batch at one dimension of the result."""
        if self.tracker.mixed(tensors):
            shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
            raise InputError(f"{_names(weights)}: the samples are at different dimensions of what it meets, {shapes}")

    @staticmethod
    def is_weight(x: Any) -> bool:
        return isinstance(x, Weight)

    @staticmethod
    def names(weights: Iterable[Any]) -> str:
        """The parameters that the weights among `weights` come from, for an error."""
        return _names(weights)

    @property
    def samples(self) -> int:
        return self.tracker.rows // self.rows_per_sample

    def tokens(self, tensor: Tensor, layout: Layout) -> Tensor:
        """[..., F] -> [B, 1, T, F], or [B, T] from an index."""
        rows_first = batch_first(tensor, layout, self.tracker.rows)
        if tensor.is_floating_point() or tensor.is_complex():
            return rows_first.reshape(self.samples, 1, -1, tensor.shape[-1])
        return rows_first.reshape(self.samples, -1)

    def dense(
        self, weight: Weight, gradient: Tensor, layout: Layout, shape: Sequence[int] | None = None
    ) -> Contribution:
        """The part of a weight (seen as of `shape`) that was broadcast: `gradient`, summed over what it has not."""
        if gradient.is_complex() and not weight.is_complex():
            gradient = gradient.real
        while weight.expanded is not None and shape is None:
            weight = weight.expanded
        shape = tuple(weight.shape if shape is None else shape)
        shape = (1,) * (gradient.dim() - len(shape)) + shape
        rows, dim = self.tracker.rows, layout.dim
        if shape[dim] != 1:
            others = [i for i, size in enumerate(shape) if size == 1 and gradient.shape[i] > 1]
            gradient = _sum(gradient, others).reshape(weight.shape)
            own = layout._replace(dim=dim - len(shape) + weight.dim())
            return weight, Aligned(gradient, own, rows, self.samples)
        target = (*shape[:dim], 1, 1, *shape[dim + 1 :])
        gradient = batch_first(gradient, layout, rows)
        gradient = _sum(gradient, [i for i, size in enumerate(target, 1) if size == 1 and gradient.shape[i] > 1])
        return weight, Dense(_sum(gradient.reshape(self.samples, self.rows_per_sample, -1), [1]).flatten(1))

    def spread(self, weight: Weight, shape: Sequence[int], layout: Layout) -> Tensor:
        """A weight broadcast to `shape`, as a tensor that depends on the samples like any other."""
        output = self.run(lambda x: x.expand(shape).clone(), weight)
        return self.record(output, (), lambda gradient: [self.dense(weight, gradient, layout)], weight)

    # What happens to a torch function

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        if func in _GRADIENT and args[0].plain is next(iter(args[0].sources.values())).leaf:
            [source] = args[0].sources.values()
            return func(source.parameter, *args[1:])
        if not self.closed:
            self._refuse_other_autograd(func, args, kwargs)
        if is_composite(func) and not self.closed:
            if func in self.rules:
                return self.rules[func](self, func, *args, **kwargs)
            with self.tracker, looked_into(func):
                return body(func)(*args, **kwargs)
        inputs = list(tensors_in((args, kwargs)))
        batch = (
            [] if self.closed else [x for x in inputs if not isinstance(x, Weight) and self.tracker.depends_on_batch(x)]
        )
        if not batch and not self.closed:
            spread = self._spread_first(func, args)
            if spread is not None:
                with self.tracker:
                    return func(*spread, **kwargs)
        if batch and torch.is_grad_enabled():
            return self._meet(func, args, kwargs)
        if batch and not self.tracker.backward_began:
            for source in {s for x in inputs if isinstance(x, Weight) for s in x.sources.values()}:
                source.expected += 1
        return self._among_weights(func, args, kwargs, [x for x in inputs if isinstance(x, Weight)])

    def _refuse_other_autograd(self, func: Callable, args: tuple, kwargs: dict) -> None:
        reason = None
        if func in (Tensor.register_hook, Tensor.register_post_accumulate_grad_hook):
            reason = "hooks on parameters do not run in this block"
        elif torch._C._functorch.peek_interpreter_stack() is not None:
            if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors_in((args, kwargs))):
                reason = "transforms of torch.func hide the samples"
        elif carries_tangent(x for x in tensors_in((args, kwargs)) if not isinstance(x, Weight)):
            reason = "tangents of forward-mode differentiation are not followed"
        if reason:
            raise InputError(f"{_names(tensors_in((args, kwargs)))}: {reason}")

    def _meet(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """A function of weights and of samples."""
        if kwargs.get("out") is not None:
            raise InputError(f"{_names(tensors_in((args, kwargs)))}: expected no out= in {name_of(func)}")
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        if func in self.rules:
            try:
                return self.rules[func](self, func, *args, **kwargs)
            except NoRule:
                if self.fallback is None:
                    raise
        spread = map_tensors(self._spread, args), map_tensors(self._spread, kwargs)
        weights = [x for x in tensors_in(spread) if isinstance(x, Weight)]
        if not weights:
            try:
                with self.tracker:
                    return func(*spread[0], **spread[1])
            except InputError:  # not one row per sample after all
                if self.fallback is None:
                    raise
        if self.fallback == "vmap":
            return map_over_samples(self, func, [(args, kwargs), spread])
        reason = f"no per-sample gradient rule for {name_of(func)}; fallback='vmap' maps it over the samples"
        raise InputError(f"{_names(weights)}: {reason}")

    def _among_weights(self, func: Callable, args: tuple, kwargs: dict, weights: list[Weight]) -> Any:
        result = func(*map_tensors(_plain, args), **map_tensors(_plain, kwargs))
        if self.closed or next(tensors_in(result), None) is None:
            return result
        sources = {name: source for weight in weights for name, source in weight.sources.items()}

        def wrap(value: Tensor) -> Tensor:
            known = next((x for x in weights if x.plain is value), None)
            if known is not None:
                return known
            if not value.requires_grad:
                return value
            weight = Weight.make(value, self, sources)
            if args and isinstance(args[0], Weight) and len(weights) == 1:
                weight.parent, weight.route = args[0], None if kwargs else route(func, args, value)
                if expands(func, args[0], value):
                    weight.expanded = args[0]
            return weight

        return map_tensors(wrap, result)

    def record_copies(self, weight: Weight, copies: Tensor) -> None:
        """`copies` [rows, *shape], one of the weight for each row, will have their gradients written out."""
        sources = set(weight.sources.values())
        for source in sources:
            source.expected += not self.tracker.backward_began
        call = _Call(None, lambda gradient: [self._written_out(weight, gradient)], sources)
        copies.register_hook(lambda gradient: self._backward_ran(call, gradient))

    def _written_out(self, weight: Weight, gradient: Tensor) -> Contribution:
        if self.weight_gradients:
            self._hand_over(weight, gradient.sum(dim=0))
        return weight, Dense(_sum(gradient.reshape(self.samples, self.rows_per_sample, -1), [1]).flatten(1))

    def _spread_first(self, func: Callable, args: tuple) -> tuple | None:
        """A weight expanded to one row per sample goes on as samples where it would be computed with."""
        if func not in self.rules or not args or not torch.is_grad_enabled():
            return None
        if getattr(self.rules[func], "elementwise", False) or not isinstance(args[0], Weight):
            return None
        spread = self._spread(args[0])
        return None if spread is args[0] else (spread, *args[1:])

    def _spread(self, x: Tensor) -> Tensor:
        if not isinstance(x, Weight) or x.expanded is None or not x.dim() or len(x) != self.tracker.rows:
            return x
        if x.expanded.dim() == x.dim() and len(x.expanded) != 1:
            return x
        output = self.spread(x, x.shape, BATCH_FIRST)
        self.tracker.assume(output)
        return output

    # The backward

    def _backward_ran(self, call: _Call, gradient: Tensor) -> None:
        if self.tracker.differentiating:
            names = _quoted(source.name for source in call.sources)
            raise InputError(f"{names}: a gradient is taken through it by torch.autograd.grad, expected one backward")
        late = [source.name for source in call.sources if source.sums is not None]
        if self.closed or late:
            raise InputError(
                f"{_quoted(late or [s.name for s in call.sources])}: a backward after its sums were made: expected one "
                "forward, then one backward, in the block"
            )
        self.fired = True
        try:
            kept = () if call.kept is None else call.kept.grad_fn.saved_tensors
        except RuntimeError as error:
            if "inplace" not in str(error):  # a checkpointed block that is made again may fail otherwise
                raise
            names = _quoted(source.name for source in call.sources)
            raise InputError(f"{names}: what it met was changed in place afterwards: {error}") from None
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for weight, part in call.contribute(*kept, gradient.detach()):
                self._add(weight, part)
            call.kept = call.contribute = None  # the graph holds on to the call: let go of what is large
            for source in call.sources:
                source.fired += 1
                if source.fired == source.expected:
                    self.finish(source)

    def _add(self, weight: Weight, part: Part) -> None:
        while weight.route is not None:
            routed = weight.route(part)
            if routed is None:
                break
            weight, part = weight.parent, routed
        for source in weight.sources.values():
            direct = weight.plain is source.leaf
            source.parts.append(part if direct else Through(part, weight.plain, source.leaf))

    def finish(self, source: ParameterUse) -> None:
        if source.sums is not None:
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            wanted, parameter = self.wanted, source.parameter
            if not source.parts:
                zeros = parameter.new_zeros(self.samples, dtype=torch.float64)
                nothing = parameter.new_zeros(parameter.numel(), dtype=torch.float64)
                source.sums = PartSums(zeros, zeros, nothing if wanted.total else None)
                return
            source.sums = part_sums(source.parts, wanted.norm, source.direction, wanted.total)
            if wanted.dot_with_total:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                direction = source.sums.total.view(parameter.shape).to(dtype)
                source.sums = source.sums._replace(dot=part_sums(source.parts, False, direction, False).dot)
            source.parts = []

    def _usable(self, x: Tensor) -> Tensor:
        """A weight's memory, for a function whose other inputs depend on the samples."""
        if not isinstance(x, Weight):
            return x
        tensor = x.plain.detach()
        if self.weight_gradients:

            def hand_over(tensor: Tensor) -> None:
                gradient, tensor.grad = tensor.grad, None
                self._hand_over(x, gradient)

            tensor.requires_grad_().register_post_accumulate_grad_hook(hand_over)
        return tensor

    def _requiring(self, x: Tensor) -> Tensor:
        tensor = self._usable(x)
        if isinstance(x, Weight) and not tensor.requires_grad:
            tensor.requires_grad_().register_post_accumulate_grad_hook(forget_gradient)
        return tensor

    def _hand_over(self, weight: Weight, gradient: Tensor) -> None:
        """Add a weight's gradient to those of its parameters, as a backward without this recorder would."""
        for source in weight.sources.values():
            own = gradient
            if weight.plain is not source.leaf:
                graph = {"retain_graph": True, "allow_unused": True}
                [own] = torch.autograd.grad(weight.plain, source.leaf, gradient, **graph)
            parameter = source.parameter
            if own is not None:
                parameter.grad = own if parameter.grad is None else parameter.grad + own


def _plain(x: Tensor) -> Tensor:
    return x.plain if isinstance(x, Weight) else x


def _sum(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum(dim=list(dims), keepdim=True, dtype=dtype) if dims else tensor.to(dtype)


def _names(weights: Iterable[Any]) -> str:
    return _quoted({name: None for weight in weights if isinstance(weight, Weight) for name in weight.sources})


def _quoted(names: Iterable[str]) -> str:
    return "parameter " + ", ".join(sorted(names))


def _refuse_gradient(names: list[str], tracker: BatchTracker) -> Callable[[Tensor], None]:
    """A hook that holds no tensor: Python does not see through such a hook, and a circle through it would stay."""

    def hook(_: Tensor) -> None:
        raise InputError(
            f"{_quoted(names)}: has a gradient that no rule covers: it reaches the loss without meeting one of the "
            f"{tracker.rows} rows of the batch, or through a function that hides it"
        )

    return hook

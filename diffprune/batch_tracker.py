"""Which tensors depend on the samples, and where in them the samples are.

`BatchTracker` watches every torch function that runs while it is active. A tensor depends on the samples if it was
computed from what the model was called with; there, the first dimension is the batch. Everything else, whatever its
length, is a constant: buffers, masks and positions that a module keeps or makes, noise. Where the batch goes when
dimensions are moved, flattened together or summed over is followed, as in `nn.MultiheadAttention` ([T, B, D], then
[T·B, D]).

A constant that has, in truth, a row for each sample does no harm: where what was computed from it and from parameters
meets the samples, each sample gets its own row's gradient (`gradient_parts.Aligned`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffprune import batch_layout as moves
from diffprune.batch_layout import BATCH_FIRST, Layout, tensors_in
from diffprune.batch_probe import Mixed, Probe
from diffprune.composites import body, is_composite, looked_into, name_of
from diffprune.errors import InputError

_CONSTANT = object()


class Row(NamedTuple):
    """All of it depends on this row of the batch."""

    row: int


class BatchTracker(TorchFunctionMode):
    """See the module. `rows` is the size of the batch, None until a module has been called.

    Tensors of the type `neutral` are somebody else's: neither constant nor not. `final` says of a composite function
    whether it is taken as a whole.
    """

    def __init__(self, neutral: type[Tensor], final: Callable[[Callable], bool] = lambda _: False) -> None:
        super().__init__()
        self.rows: int | None = None
        self.backward_began = False
        self.differentiating = False  # torch.autograd.grad runs
        self._neutral, self._final = neutral, final
        self._layouts = WeakTensorKeyDictionary()  # `Row`: it has one; None: it is not known where the batch went
        self._assumed = WeakTensorKeyDictionary()  # the first dimension was taken for the batch for its length alone
        self._constants = WeakTensorKeyDictionary()  # known before there is a batch; afterwards all others are
        self._parameters = WeakTensorKeyDictionary()
        self._inside: list[nn.Module] = []
        self._probe = Probe(self._known_layout)

    # What the model is called with

    def add_constant(self, tensor: Tensor) -> None:
        self._constants[tensor] = "the model's"

    def add_parameter(self, name: str, tensor: Tensor) -> None:
        self._parameters[tensor] = name

    def enter(self, module: nn.Module, inputs: Any, whole: bool) -> None:
        """`module` is called. What a call from outside all modules gets has a row for each sample."""
        if torch.is_grad_enabled() and (not self._inside or self.rows is None):
            self._take_inputs(inputs, whole)
        self._inside.append(module)

    def leave(self, module: nn.Module) -> None:
        if module in self._inside:  # a hook before ours may have raised
            del self._inside[len(self._inside) - 1 - self._inside[::-1].index(module) :]

    def _take_inputs(self, inputs: Any, whole: bool) -> None:
        if self.rows is None:
            _refuse_list_of_samples(inputs)
        again = self.backward_began and self.rows is not None  # a checkpointed block, with inputs that were detached
        for tensor in _tensors_within(inputs):
            if whole and not self._inside:  # the loop may have made what it calls the model with
                constant = self._constants.get(tensor) == "the model's"
            else:
                constant = tensor in self._constants
            if constant or not tensor.dim() or isinstance(tensor, self._neutral):
                continue
            if self.rows is None:
                self._set_rows(tensor)
            plain = tensor.requires_grad and tensor.shape.count(self.rows) == 1
            if len(tensor) == self.rows and tensor not in self._layouts and (plain or not again):
                self._layouts[tensor] = BATCH_FIRST

    def _set_rows(self, tensor: Tensor) -> None:
        if not len(tensor):
            raise InputError(
                f"per_sample_gradients: expected a batch of at least one sample, got {tuple(tensor.shape)}"
            )
        self.rows = len(tensor)

    def assume(self, tensor: Tensor) -> None:
        """Its first dimension is taken for the batch; if that gets lost before it meets another one, it was not."""
        self._layouts[tensor] = BATCH_FIRST
        self._assumed[tensor] = True

    # What is known of a tensor

    def depends_on_batch(self, tensor: Tensor) -> bool:
        if tensor.requires_grad or tensor in self._layouts:
            return True
        return self.rows is None and tensor.dim() > 0 and tensor not in self._constants

    def layout(self, tensor: Tensor) -> Layout | None:
        """Where the batch is, None if that is not known."""
        if self.rows is None and tensor.dim():  # a parameter that is used without a call of its module
            self._set_rows(tensor)
            self._layouts[tensor] = BATCH_FIRST
        found = self._known_layout(tensor)
        if found is None and self.rows == 1 and tensor.dim() and len(tensor):
            return Layout(0, len(tensor))  # of the one sample is everything
        return found

    def _known_layout(self, tensor: Tensor) -> Layout | None:
        found = self._state(tensor)
        return found if isinstance(found, Layout) else None

    def _state(self, tensor: Tensor) -> Any:
        found = self._layouts.get(tensor, _CONSTANT)
        if found is _CONSTANT and tensor.requires_grad and tensor.grad_fn is not None:
            # Made by a function that is not seen, such as an autograd.Function
            if isinstance(tensor, self._neutral) or self.rows is None or self.rows not in tensor.shape:
                return _CONSTANT
            return BATCH_FIRST if len(tensor) == self.rows and tensor.shape.count(self.rows) == 1 else None
        return found

    # Watching

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad and not self.differentiating:
            return self._differentiated(func, types, args, kwargs)
        backward = func in (Tensor.backward, torch.autograd.backward)  # in a backward, where a checkpoint is made again
        composite = backward or is_composite(func)
        if composite and self._neutral not in types:
            if func is F.batch_norm:
                refuse_batch_statistics(*args, **kwargs)
            self.backward_began |= backward
            with self, looked_into(func):
                return body(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        if not composite or self._final(func):
            self._note(func, args, kwargs, result)
        return result

    def _differentiated(self, func: Callable, types: Any, args: tuple, kwargs: dict) -> Any:
        for x in tensors_in((args[1:], kwargs.get("inputs"))):
            if isinstance(x, self._neutral) or x in self._parameters:
                names = x.sources if isinstance(x, self._neutral) else (self._parameters[x],)
                raise InputError(
                    f"parameter {', '.join(names)}: torch.autograd.grad is not followed; use a plain backward"
                )
        self.differentiating = True
        try:
            return self.__torch_function__(func, types, args, kwargs)
        finally:
            self.differentiating = False

    def _note(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        if func is Tensor.__setitem__:
            self._note_written(*args)
            return
        outputs = [x for x in tensors_in(result) if not isinstance(x, self._neutral)]
        if not outputs:
            return
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        inputs = [x for x in tensors_in((args, kwargs)) if not isinstance(x, self._neutral)]
        known = inputs or self.rows is not None or func in moves.FACTORIES
        if known and all(x in self._constants and not x.requires_grad for x in inputs):
            for output in outputs:
                self._constants.setdefault(output, "made")
        if self.rows is None:
            return
        sources, layouts = [], []
        for x in inputs:
            layout = self._state(x)
            if layout is not _CONSTANT:
                sources.append(x)
                layouts.append(layout)
        if not sources:
            return
        if not self._inside and func in moves.POINTWISE:
            self._refuse_strangers(func, inputs, sources)
        first = sources[0] is args[0] if args else False
        if func in moves.MOVING or func in moves.LENDING or func in moves.LIKE or func in moves.NEW:
            if not first and func not in moves.INDEXING:
                return
            if func in moves.LIKE or func in moves.NEW:
                if isinstance(layouts[0], Layout) and outputs[0].shape == sources[0].shape:
                    self._layouts[outputs[0]] = layouts[0]
                return
            if first:
                sources, layouts = sources[:1], layouts[:1]
        shape = outputs[0].shape
        lost = not all(isinstance(layout, Layout) for layout in layouts)
        if lost and func in moves.ARITHMETIC and any(x.requires_grad and x.shape == shape for x in sources):
            kept = [i for i, x in enumerate(sources) if isinstance(layouts[i], Layout) or x.requires_grad]
            sources, layouts = [sources[i] for i in kept], [layouts[i] for i in kept]  # e.g. one row's angles
        found = self._found(func, args, kwargs, sources, layouts, outputs, result)
        assumed = [x in self._assumed for x in sources] if len(self._assumed) else [False]
        for output, layout in zip(outputs, found, strict=True):
            if any(assumed) and layout is None and self.rows > 1:
                raise InputError(
                    f"{name_of(func)}: a parameter that was expanded to {self.rows} rows, as many as there are "
                    f"samples, is used as if they were none: {tuple(sources[0].shape)} to {tuple(output.shape)}; try "
                    "another batch size"
                )
            self._layouts[output] = layout
            if all(assumed):
                self._assumed[output] = True
            elif output in self._assumed:
                del self._assumed[output]

    def _refuse_strangers(self, func: Callable, inputs: list[Tensor], sources: list[Tensor]) -> None:
        """Outside of all modules: what is larger than the supposed samples may be the samples."""
        most = max(x.dim() for x in sources)
        for x in inputs:
            known = x in self._constants or x.requires_grad or self._state(x) is not _CONSTANT
            if not known and x.dim() > most and len(x) > 1:
                raise InputError(
                    f"{name_of(func)}: a tensor {tuple(x.shape)} that no module was called with meets what was taken "
                    f"for {self.rows} samples, {tuple(sources[0].shape)}: call the model itself, with the batch first"
                )

    def _found(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        sources: list[Tensor],
        layouts: list[Layout | Row | None],
        outputs: list[Tensor],
        result: Any,
    ) -> list[Layout | Row | None]:
        nowhere: list[Layout | Row | None] = [None] * len(outputs)
        if not all(isinstance(layout, Layout) for layout in layouts):
            return [layouts[0]] * len(outputs) if len(set(layouts)) == 1 else nowhere
        source, layout = sources[0], layouts[0]
        if func in moves.DISPLACING:
            displaced = moves.displaced_dims(func, args, kwargs)
            written = func in moves.WRITING and source is not args[0]  # a constant, of the output's shape
            if (written or source is args[0]) and any(one.dim in displaced for one in layouts):
                return nowhere
        if func in moves.INDEXING and source is args[0] and layout == BATCH_FIRST and len(source) == self.rows:
            row = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            if type(row) is int:
                return [Row(row % self.rows)]
        if func in moves.INDEXING and source is args[0] and len(sources) == 1:
            picked = moves.picked(args[1], layout, source.dim(), self.rows)
            if picked is not None:
                return [picked]
        if func in moves.MOVING and source is args[0]:
            return [moves.moved(func, args, kwargs, source, layout, output, self.rows) for output in outputs]
        if func in moves.JOINING and moves.along(func, args, kwargs, source, layout):  # whole batches: more of `outer`
            every = args[0] if args else kwargs["tensors"]
            return [layout if len(set(layouts)) == 1 and len(every) == len(sources) else None]
        if func in moves.SPLITTING and moves.along(func, args, kwargs, source, layout):
            return [layout if moves.split(source, layout, outputs, self.rows) else None] * len(outputs)
        if func in moves.STRIDING:
            return [layout if moves.strided(source, layout, outputs[0]) else None]
        if self._is_plain(sources, layouts, outputs) or moves.token_by_token(func, args, sources, layout):
            return [layout] * len(outputs)
        try:
            if func in moves.POINTWISE and len(outputs) == 1:
                return [_broadcast(sources, layouts, outputs[0])]
            if not any(output.dim() for output in outputs):
                return nowhere
            return self._probe(func, args, kwargs, result)
        except Mixed as mixed:
            known = mixed.certain or func in moves.POINTWISE or func in moves.PRODUCTS
            if known and self.rows > 1 and any(x.requires_grad for x in sources):
                raise self._mixed(func, sources) from None
            return nowhere

    def _is_plain(self, sources: list[Tensor], layouts: list[Layout], outputs: list[Tensor]) -> bool:
        """All have the batch at one place, and no other dimension is as long: then it cannot have gone elsewhere."""
        layout = layouts[0]
        dim, dims = layout.dim, sources[0].dim()
        size = sources[0].shape[dim]
        for x, own in zip(sources, layouts, strict=True):
            if own != layout or x.shape[dim] != size or x.shape.count(size) != 1:
                return False
            if x.dim() != dims and (dim or len(sources) > 1):
                return False
        for output in outputs:
            new = output.shape
            if dim >= len(new) or new[dim] != size or (dim and len(new) != dims) or new.count(size) != 1:
                return False
        return True

    def _mixed(self, func: Callable, sources: list[Tensor]) -> InputError:
        shapes = ", ".join(str(tuple(x.shape)) for x in sources)
        return InputError(
            f"{name_of(func)}: the {self.rows} samples are at different dimensions of what meets here, {shapes}: "
            "either samples are mixed, and have no gradients of their own, or something else is as long as the batch "
            "and was taken for it; then another batch size helps"
        )

    def mixed(self, tensors: list[Tensor]) -> bool:
        """Whether tensors that are broadcast together have the batch at different dimensions."""
        places = {(x.dim() - layout.dim, layout.inner) for x in tensors if (layout := self.layout(x)) is not None}
        return self.rows != 1 and len(places) > 1

    def _note_written(self, tensor: Tensor, index: Any, value: Any) -> None:
        """`tensor[index] = value`"""
        if isinstance(tensor, self._neutral) or self.rows is None:
            return
        before = self._layouts.get(tensor, _CONSTANT)
        values = [x for x in tensors_in((value,)) if not isinstance(x, self._neutral)]
        picks = list(tensors_in((index,)))
        states = [state for x in (*values, *picks) if (state := self._state(x)) is not _CONSTANT]
        if not states and (before is _CONSTANT or not picks):
            return
        first = index[0] if isinstance(index, tuple) and index else index
        if picks or not all(isinstance(state, (Layout, Row)) for state in states):
            after = None
        elif isinstance(states[0], Row):  # each sample is written by itself
            own = type(first) is int and len(tensor) == self.rows and first % self.rows == states[0].row
            after = BATCH_FIRST if own else None
        else:
            after = moves.written(index, tuple(tensor.shape), values[0], states[0])
        self._layouts[tensor] = after if before in (_CONSTANT, after) else None


def _broadcast(sources: list[Tensor], layouts: list[Layout], output: Tensor) -> Layout | None:
    """Where tensors that are broadcast together put the batch."""
    dims = output.dim()
    places = {layout._replace(dim=layout.dim + dims - x.dim()) for x, layout in zip(sources, layouts, strict=True)}
    if len(places) > 1:
        raise Mixed
    [place] = places
    size = sources[0].shape[layouts[0].dim]
    return place if place.dim >= 0 and output.shape[place.dim] == size else None


def _refuse_list_of_samples(inputs: tuple[tuple, dict]) -> None:
    """What a model is called with first says how many samples there are: a list may have one in each tensor."""
    args, kwargs = inputs
    first = next((value for value in (*args, *kwargs.values()) if any(True for _ in _tensors_within(value))), None)
    if isinstance(first, list):
        raise InputError(
            f"expected a tensor with the batch as its first dimension, got a list of {len(first)}: stack the samples "
            "before the model, or give its inputs in a tuple if each of them has all samples"
        )


def _tensors_within(value: Any) -> Iterator[Tensor]:
    """As `tensors_in`, and those in objects that hold a batch together."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_within(item)
    elif isinstance(value, Mapping):
        yield from _tensors_within(list(value.values()))
    elif hasattr(value, "__dict__") and not callable(value):
        yield from tensors_in(vars(value))


def refuse_batch_statistics(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *args: Any,
    **kwargs: Any,
) -> None:
    """The signature is `F.batch_norm`'s."""
    if training:
        raise InputError(
            "BatchNorm with the statistics of the batch (training mode): each sample's loss depends on the others', so "
            "that there is no gradient of one sample. Put these layers into .eval(), or use GroupNorm"
        )

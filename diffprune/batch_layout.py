"""Which tensors do not depend on the samples, and where in the others the samples are.

`BatchTracker` watches every torch function that runs while it is active. By default a tensor's first dimension is the
batch. What the tracker adds: constants (position indices, buffers, masks without a batch), so that a table of as many
rows as there are samples is not taken for a batch; and the batch's place after it was transposed or flattened together
with other dimensions, as in `nn.MultiheadAttention` ([T, B, D], then [T·B, D]).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffprune.errors import InputError


class Layout(NamedTuple):
    """Dimension `dim` counts outer · rows · inner: index = (o · rows + row) · inner + i."""

    dim: int
    inner: int = 1


BATCH_FIRST = Layout(0)


def batch_first(tensor: Tensor, layout: Layout, rows: int) -> Tensor:
    """[..., outer·rows·inner, ...] -> [rows, ..., outer, inner, ...], a view."""
    return tensor.unflatten(layout.dim, (-1, rows, layout.inner)).movedim(layout.dim + 1, 0)


class BatchTracker(TorchFunctionMode):
    """See the module. `rows` is the size of the batch, None until a module has been called.

    Tensors of the type `neutral` are somebody else's: neither constant nor not.
    """

    def __init__(self, neutral: type[Tensor]) -> None:
        super().__init__()
        self.rows: int | None = None
        self.backward_began = False
        self._neutral = neutral
        self._constants = WeakTensorKeyDictionary()
        self._layouts = WeakTensorKeyDictionary()  # None: the batch was somewhere, and where it went is not known

    def add_constant(self, tensor: Tensor) -> None:
        self._constants[tensor] = True

    def set_rows(self, inputs: Any) -> None:
        """The outermost module got `inputs`: the first tensor in them says how many rows a batch has."""
        for tensor in tensors_in(inputs):
            if tensor.dim() and self.rows is None:
                self.rows = len(tensor)
            if tensor.dim() and len(tensor) == self.rows:
                self._constants.pop(tensor, None)

    def depends_on_batch(self, tensor: Tensor) -> bool:
        if tensor.requires_grad:
            return True
        if tensor.dim() == 0 or tensor in self._constants:
            return False
        return tensor in self._layouts or self.rows is None or len(tensor) == self.rows

    def layout(self, tensor: Tensor) -> Layout | None:
        """Where the batch is, None if that is not known."""
        layout = self._layouts.get(tensor, BATCH_FIRST)
        if layout is BATCH_FIRST and self.rows is None and tensor.dim():
            self.rows = len(tensor)
        if layout is BATCH_FIRST and not (tensor.dim() and len(tensor) == self.rows):
            return None
        return layout

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if is_composite(func) and self._neutral not in types:  # `Tensor.backward` too
            if func is F.batch_norm:
                refuse_batch_statistics(*args, **kwargs)
            self.backward_began |= func in (Tensor.backward, torch.autograd.backward)
            with self, looked_into(func):
                result = body(func)(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        outputs = [x for x in tensors_in(result) if not isinstance(x, self._neutral)]
        if func is Tensor.__setitem__ and self.rows is not None and self.depends_on_batch(args[0]):
            self._constants.pop(args[0], None)
            if any(True for _ in tensors_in((args[1],))):  # with numbers each sample is written by itself
                self._layouts[args[0]] = None
        if not outputs:
            return
        if not args and "input" in kwargs:
            kwargs = dict(kwargs)
            args = (kwargs.pop("input"),)
        inputs = [x for x in tensors_in((args, kwargs)) if not isinstance(x, self._neutral)]
        known = [x in self._constants and not x.requires_grad for x in inputs]
        if all(known):
            if inputs or func in _FACTORIES:
                for output in outputs:
                    self._constants[output] = True
            return
        for output in outputs:
            self._constants.pop(output, None)  # changed in place, perhaps
        moved = func in _MOVING and inputs[0] is args[0] and not known[0]
        sources = [args[0]] if moved else [x for x in inputs if x in self._layouts]
        if func in _ARITHMETIC and any(x.requires_grad and x.shape == outputs[0].shape for x in inputs):
            sources = [x for x in sources if self._layouts[x] is not None or x.requires_grad]  # e.g. one row's angles
        if self.rows is not None and func in (_WRITING if known[0] else _DISPLACING):
            layout = self._layouts.get(args[0], BATCH_FIRST)
            if layout is None or layout.dim in _displaced_dims(func, args, kwargs):
                for output in outputs:
                    self._layouts[output] = None
                return
        if self.rows is None or not sources or (sources[0] in self._constants):
            return
        source, layout = sources[0], self._layouts.get(sources[0], BATCH_FIRST)
        if layout == BATCH_FIRST and (not source.dim() or len(source) != self.rows) and source not in self._layouts:
            return
        for output in outputs:
            if output is source:
                continue
            found = None if layout is None else self._moved(func, args, kwargs, source, layout, output)
            if found == BATCH_FIRST and len(output) == self.rows:
                self._layouts.pop(output, None)
            else:
                self._layouts[output] = found

    def _moved(
        self, func: Callable, args: tuple, kwargs: dict, source: Tensor, layout: Layout, output: Tensor
    ) -> Layout | None:
        dim, shape, new = layout.dim, source.shape, output.shape
        if func in _PERMUTING:
            probe = torch.empty([2 if i == dim else 1 for i in range(len(shape))], device="meta")
            image = next(tensors_in(func(probe, *args[1:], **kwargs)))
            return Layout(image.shape.index(2), layout.inner) if 2 in image.shape else None  # unbound: each row apart
        if func in _INDEXING:
            return _indexed(args[1], layout, len(shape))
        if func in _REPEATING:
            return Layout(dim + len(new) - len(shape), layout.inner)  # the whole dimension again: more of `outer`
        if func in _INTERLEAVING:
            return _interleaved(shape, layout, *args[1:], **kwargs)
        if func in _RESHAPING:
            return _reshaped(shape, layout, new, self.rows) if output.numel() == source.numel() else None
        if dim < len(new) and new[dim] == shape[dim] and (dim == 0 or len(new) == len(shape)):
            return layout
        return None


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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


_open: list[Callable] = []


def is_composite(func: Callable) -> bool:
    """Whether it is written in Python: what it calls is what counts. One that calls itself is its own last word."""
    return isinstance(func, FunctionType) and func not in _open


@contextmanager
def looked_into(func: Callable) -> Iterator[None]:
    _open.append(func)
    try:
        yield
    finally:
        _open.pop()


@cache
def body(func: FunctionType) -> FunctionType:
    """A torch function written in Python, without its own dispatch: what it calls is dispatched instead."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    own = func.__globals__ | dict.fromkeys(names, lambda *_: False)
    copy = FunctionType(func.__code__, own, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _reshaped(shape: tuple, layout: Layout, new: tuple, rows: int) -> Layout | None:
    """A reshape keeps the elements' order, in which a row is `stride` elements that repeat every rows·stride."""
    stride = layout.inner * math.prod(shape[layout.dim + 1 :])
    for dim in range(len(new)):
        rest = math.prod(new[dim + 1 :])
        if rest and stride % rest == 0 and new[dim] * rest % (rows * stride) == 0:
            return Layout(dim, stride // rest)
    return None


def _interleaved(
    shape: tuple, layout: Layout, repeats: Any = None, dim: int | None = None, output_size: int | None = None
) -> Layout | None:
    """The signature is `repeat_interleave`'s: elements of a dimension beside their copies."""
    if dim is None and len(shape) > 1:
        return None
    if (dim or 0) % len(shape) != layout.dim:
        return layout
    return Layout(layout.dim, layout.inner * repeats) if type(repeats) is int else None


def _displaced_dims(func: Callable, args: tuple, kwargs: dict) -> set[int]:
    """The dimensions of ``args[0]`` along which elements get other places; all where none is named or usual."""
    dims, place = args[0].dim(), _DISPLACING[func]
    given = kwargs.get("dim", kwargs.get("dims", () if place is None else args[place:]))
    given = [given] if isinstance(given, int) else [one for one in given or () if isinstance(one, (int, tuple, list))]
    named = [dim for one in given for dim in ([one] if isinstance(one, int) else one)]
    return {dim % max(1, dims) for dim in named or ([-1] if func in _ALONG_THE_LAST else range(dims))}


def _indexed(index: Any, layout: Layout, dims: int) -> Layout | None:
    """`tensor[index]` for integers, slices, None and an ellipsis that leave the batch whole."""
    index = index if isinstance(index, tuple) else (index,)
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in index):
        return layout if layout.dim == 0 and index[0] == slice(None) else None
    given = sum(item is not None and item is not Ellipsis for item in index)
    source = target = 0
    for item in (*index, *([] if Ellipsis in index else [Ellipsis])):
        if item is None:
            target += 1
            continue
        for _ in range(dims - given if item is Ellipsis else 1):
            if source == layout.dim:
                return Layout(target, layout.inner) if item is Ellipsis or item == slice(None) else None
            source += 1
            target += type(item) is not int
    return None


def _functions(*names: str) -> set[Callable]:
    owners = (torch, Tensor)
    return {getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)}


def _places(**places: int | None) -> dict[Callable, int | None]:
    """By function: those of these names, and in place."""
    return {func: place for name, place in places.items() for func in _functions(name, f"{name}_")}


_FACTORIES = {torch.arange, torch.linspace, torch.zeros, torch.ones, torch.full, torch.eye}
_PERMUTING = _functions("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "unbind") | {
    Tensor.T.__get__,
    Tensor.mT.__get__,
}
_RESHAPING = _functions("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
_REPEATING = _functions("repeat", "tile", "expand", "expand_as", "broadcast_to")
_INTERLEAVING = _functions("repeat_interleave")
_INDEXING = {Tensor.__getitem__}
# Functions that give elements another place, and where in their arguments the dimension stands (None: in all of them).
_WRITING = _places(
    index_add=1, index_copy=1, scatter=1, scatter_add=1, scatter_reduce=1, index_put=None, masked_scatter=None
)
_DISPLACING = _WRITING | _places(
    index_select=1, gather=1, flip=1, sort=1, topk=2, take_along_dim=2, roll=2, masked_select=None, take=None
)
_ALONG_THE_LAST = _functions("sort", "topk")  # unless another is named
_ARITHMETIC = _functions("add", "sub", "mul", "div", "true_divide")
_MOVING = _PERMUTING | _RESHAPING | _REPEATING | _INTERLEAVING | _INDEXING

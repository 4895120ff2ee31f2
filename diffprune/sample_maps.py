"""A torch function that has no rule, mapped over the samples: one row at a time, with a copy of each weight for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffprune.batch_layout import map_tensors, tensors_in
from diffprune.composites import name_of
from diffprune.errors import InputError

if TYPE_CHECKING:
    from diffprune.weight_tensors import Recorder

_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def map_over_samples(recorder: Recorder, func: Callable, ways: Sequence[tuple[tuple, dict]]) -> Any:
    """`func` on one row at a time, as a batch of one. What it returns is as if it had run on the whole batch.

    Whether a constant of as many rows as there are samples has one for each is tried out: only what returns the shape
    that the whole batch has, with the samples at one of its dimensions, is right. `ways`: the arguments, with weights
    that were expanded to as many rows as they are, and as samples.

    Raises: InputError where no way does.
    """
    name = name_of(func)
    shapes = _shapes(func, *ways[0])
    in_place = name.endswith("_") and func is not Tensor.__getitem__
    reason: Any = "it changes its input in place" if in_place or shapes is None else None
    if reason is None:
        for rows_apart, (args, kwargs) in product((False, True), ways):
            try:
                result = _mapped(recorder, func, args, kwargs, rows_apart, shapes)
            except InputError:
                raise
            except _ERRORS as error:
                reason = reason or str(error).partition("\n")[0]
                continue
            if result is not None:
                return result
    weights = [x for x in tensors_in(ways[0]) if recorder.is_weight(x)]
    reason = reason or "what it returns for one row has not the shape of a batch of one"
    raise InputError(f"{recorder.names(weights)}: {name} cannot be mapped over the samples: {reason}")


def _mapped(
    recorder: Recorder, func: Callable, args: tuple, kwargs: dict, rows_apart: bool, shapes: list[torch.Size]
) -> Any:
    """None if the shapes say that a constant was not taken for what it is. `rows_apart`: it has a row for each."""
    rows = recorder.tracker.rows
    weights, copies, flat, places = [], [], [], []

    def take(x: Tensor) -> Tensor:
        place = None
        if recorder.is_weight(x):
            weights.append(x)
            x, place = x.plain.detach().expand(rows, *x.shape).requires_grad_(), 0
            copies.append(x)
        elif recorder.tracker.depends_on_batch(x):
            layout = recorder.layout(x, *tensors_in((args, kwargs)))
            place = layout.dim
            if x.shape[place] != rows:
                raise InputError(
                    f"{recorder.names(tensors_in((args, kwargs)))}: expected a dimension of the batch alone to map "
                    f"over, {rows} rows, got {tuple(x.shape)}"
                )
            x = x.unsqueeze(place + 1)
        elif rows_apart and x.dim() and len(x) == rows:
            x, place = x.unsqueeze(1), 0
        flat.append(x)
        places.append(place)
        return x

    map_tensors(take, args), map_tensors(take, kwargs)

    def one(*tensors: Tensor) -> Any:
        following = iter(tensors)
        return func(*map_tensors(lambda _: next(following), args), **map_tensors(lambda _: next(following), kwargs))

    result = torch.func.vmap(one, in_dims=tuple(places), randomness="different")(*flat)
    outputs = list(tensors_in(result))
    dims = [_batch_dim(output.shape[1:], shape, rows) for output, shape in zip(outputs, shapes, strict=True)]
    if None in dims:
        return None
    for weight, own in zip(weights, copies, strict=True):
        recorder.record_copies(weight, own)
    following = iter(dims)

    def whole(output: Tensor) -> Tensor:
        dim = next(following)
        return output.movedim(0, dim).squeeze(dim + 1)

    return map_tensors(whole, result)


def _batch_dim(one: Sequence[int], whole: Sequence[int], rows: int) -> int | None:
    """The dimension that is of size 1 for one row, and `rows` for all."""
    if len(one) != len(whole):
        return None
    for dim, (single, size) in enumerate(zip(one, whole, strict=True)):
        rest = all(a == b for i, (a, b) in enumerate(zip(one, whole, strict=True)) if i != dim)
        if single == 1 and size == rows and rest:
            return dim
    return None


def _shapes(func: Callable, args: tuple, kwargs: dict) -> list[torch.Size] | None:
    """Of what the function returns for the whole batch; None where it returns nothing."""

    def empty(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    def plain(x: Tensor) -> Tensor:
        return getattr(x, "plain", x).detach()

    with torch._C.DisableTorchFunction(), torch.no_grad():
        try:
            result = func(*map_tensors(empty, args), **map_tensors(empty, kwargs))
        except _ERRORS:
            result = func(*map_tensors(plain, args), **map_tensors(plain, kwargs))
    return [x.shape for x in tensors_in(result)] or None

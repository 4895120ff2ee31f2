"""Where a torch function puts the batch, found by running it on shapes alone.

The function runs on tensors without memory in which the dimension of the batch is one longer. The only dimension of
the output that grows is the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from diffprune.batch_layout import FOLLOWING, Layout, map_tensors, tensors_in


class Mixed(Exception):
    """The batch is at several dimensions of the output. Not `certain`: or the function does not run on shapes."""

    def __init__(self, certain: bool = True) -> None:
        self.certain = certain


class Probe:
    """Remembers what it found. `layout_of(tensor)`: where a tensor has the batch, None if it does not depend on it."""

    def __init__(self, layout_of: Callable[[Tensor], Layout | None]) -> None:
        self._layout_of = layout_of
        self._known: dict[Hashable, list[Layout | None] | bool] = {}  # mixed: whether that is certain

    def __call__(self, func: Callable, args: tuple, kwargs: dict, result: Any) -> list[Layout | None]:
        """A layout for each tensor of `result`; None where it is not found."""
        layouts = [self._layout_of(x) for x in tensors_in((args, kwargs))]
        key = (func, _described((args, kwargs)), tuple(layouts))
        if key not in self._known:
            try:
                self._known[key] = self._probed(func, args, kwargs, layouts, list(tensors_in(result)))
            except Mixed as mixed:
                self._known[key] = mixed.certain
        found = self._known[key]
        if isinstance(found, bool):
            raise Mixed(found)
        return found

    def _probed(
        self, func: Callable, args: tuple, kwargs: dict, layouts: list[Layout | None], outputs: list[Tensor]
    ) -> list[Layout | None]:
        tensors = list(tensors_in((args, kwargs)))
        sizes = {x.shape[layout.dim] for x, layout in zip(tensors, layouts, strict=True) if layout is not None}
        inner = {layout.inner for layout in layouts if layout is not None}
        dims = [None if layout is None else layout.dim for layout in layouts]
        grown = None if func in FOLLOWING else self._run(func, args, kwargs, dims)
        if grown is None:  # constants may have a row for each sample
            source = next(x for x, dim in zip(tensors, dims, strict=True) if dim is not None)
            place = next(dim for dim in dims if dim is not None)
            aligned = [
                _row_dim(x, source.shape[place], source.dim() - place) if dim is None else dim
                for x, dim in zip(tensors, dims, strict=True)
            ]
            grown = self._run(func, args, kwargs, aligned)
        if grown is None:
            if sum(dim is not None for dim in dims) > 1 and len(set(layouts) - {None}) > 1:
                raise Mixed(certain=False)
            return [None] * len(outputs)
        if [len(shape) for shape in grown] != [output.dim() for output in outputs]:
            return [None] * len(outputs)
        found = []
        for output, shape in zip(outputs, grown, strict=True):
            steps = [new - old for new, old in zip(shape, output.shape, strict=True)]
            at = [dim for dim, step in enumerate(steps) if step]
            if len(at) > 1:
                raise Mixed
            whole = len(at) == 1 and steps[at[0]] == 1 and output.shape[at[0]] in sizes
            found.append(Layout(at[0], *inner) if whole and len(inner) == len(sizes) == 1 else None)
        return found

    def _run(self, func: Callable, args: tuple, kwargs: dict, dims: list[int | None]) -> list[torch.Size] | None:
        following = iter(dims)

        def empty(x: Tensor) -> Tensor:
            dim = next(following)
            shape = [size + (i == dim) for i, size in enumerate(x.shape)]
            dtype = torch.float32 if x.is_floating_point() else x.dtype  # autocast does not reach this device
            return torch.empty(shape, dtype=dtype, device="meta")

        with torch._C.DisableTorchFunction(), torch.no_grad():
            try:
                return [x.shape for x in tensors_in(func(*map_tensors(empty, args), **map_tensors(empty, kwargs)))]
            except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):  # not for these shapes
                return None


def _row_dim(constant: Tensor, size: int, from_right: int) -> int | None:
    """Where a constant is as long as the batch: best where the batch is, counted from the last dimension."""
    places = [dim for dim in (constant.dim() - from_right, *range(constant.dim())) if 0 <= dim < constant.dim()]
    return next((dim for dim in places if constant.shape[dim] == size), None)


def _described(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return (value.shape, value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_described(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, _described(item)) for key, item in value.items())
    return repr(value)

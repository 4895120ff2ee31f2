"""How a part of a gradient is taken back through what parameters alone went through, without writing it out.

A slice of a matrix, its transpose, a table looked up at fixed positions: the part for the result is, in another form, a
part for the matrix. Whatever is not here is left to autograd (`gradient_parts.Through`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.gradient_parts import Dense, Outer, Part, Scatter

if TYPE_CHECKING:
    from diffprune.weight_tensors import Weight

Route = Callable[[Part], "Part | None"]  # a part for a weight -> the same for its parent, None if it has no such form


def route(func: Callable, args: tuple, value: Tensor) -> Route | None:
    """How a part for `value` becomes one for args[0], from which it was computed; None if only autograd can tell."""
    parent = args[0]
    if value.is_complex() != parent.is_complex():
        return None
    if func is torch.embedding and not any(args[3:]):
        index = args[1].flatten()
        padding = args[2] if len(args) > 2 else -1

        def scatter(part: Part) -> Part | None:
            if not isinstance(part, Dense):
                return None
            gradient = part.gradient.view(part.samples, len(index), -1)
            if padding >= 0:
                gradient = gradient.masked_fill((index == padding)[:, None], 0)
            return Scatter(index.expand(part.samples, -1), gradient, parent.shape)

        return scatter
    if func in _SAME_ORDER and value.numel() == parent.numel():
        return lambda part: part if isinstance(part, (Dense, Outer)) else None
    if func in _TRANSPOSING and parent.dim() == 2 and value.stride() == parent.stride()[::-1]:
        return _transposed
    if parent.dim() and value.dim() == parent.dim() and value.shape[1:] == parent.shape[1:]:
        return _row_slice(parent, value)
    return None


def expands(func: Callable, parent: Tensor, value: Tensor) -> bool:
    if func not in (Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, torch.tile, Tensor.tile):
        return False
    shape = (1,) * (value.dim() - parent.dim()) + tuple(parent.shape)
    return all(new == old or old == 1 for new, old in zip(value.shape, shape, strict=True))


def _row_slice(parent: Weight, value: Tensor) -> Route | None:
    """Some rows of a weight, as of a chunk of fused projections."""
    plain = parent.plain
    same_memory = value.untyped_storage().data_ptr() == plain.untyped_storage().data_ptr()
    if not (same_memory and plain.is_contiguous() and value.is_contiguous() and value.numel()):
        return None
    size = plain[0].numel()
    start = (value.storage_offset() - plain.storage_offset()) // size
    after = len(plain) - start - len(value)

    def pad(part: Part) -> Part | None:
        if isinstance(part, Dense):
            return Dense(F.pad(part.gradient, (start * size, after * size)))
        if isinstance(part, Outer) and part.groups == 1 and part.rows == len(value):
            return Outer([(F.pad(left[:], (start, after)), right) for left, right in part.pairs])
        return None

    return pad


def _transposed(part: Part) -> Part | None:
    single = isinstance(part, Outer) and part.groups == 1
    return Outer([(right[:], left) for left, right in part.pairs]) if single else None


_TRANSPOSING = {Tensor.t, torch.t, Tensor.transpose, torch.transpose, Tensor.T.__get__, Tensor.mT.__get__}
_ORDER_KEEPING = (
    "view, reshape, flatten, unflatten, unsqueeze, squeeze, view_as, reshape_as, contiguous, clone, "
    "to, float, half, bfloat16, double, type, type_as"
)
_SAME_ORDER = {
    getattr(owner, name) for name in _ORDER_KEEPING.split(", ") for owner in (Tensor, torch) if hasattr(owner, name)
}

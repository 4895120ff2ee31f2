"""What one use of a parameter adds to each sample's gradient, in the form that needs the least memory.

A parameter's gradient is the sum of the parts of all its uses. `PartSums` are what is wanted of it, per sample and in
total; only where parts of different kinds meet, and have no formula for their cross term, are gradients written out, a
few samples at a time. In shapes B counts samples; all of a sample's rows are folded into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.batch_layout import Layout, batch_first
from diffprune.kernels import linear_grad_dot, linear_grad_sqnorm, linear_grad_sqnorm_dot

BLOCK = 2**22
"""Elements of a temporary on the CPU: 16 MiB in float32. A GPU takes 16 times as many."""

STRIP = 2**16
"""Elements of a sample's product that are made at once."""

MANY_TOKENS = 16
"""From here on `Outer.total` forms a matrix product per sample in the inputs' precision, below one in float64 over all
samples: a sum over samples must not depend on which of them share a batch."""


class PartSums(NamedTuple):
    sqnorm: Tensor | None  # [B] float64
    dot: Tensor | None  # [B] float64
    total: Tensor | None  # [P] float64


class Part:
    """One part. A subclass says how it is written out, and overrides what it can do without that."""

    samples: int
    parameters: int  # P
    device: torch.device

    def write_out(self, own: slice) -> Tensor:
        """[b, P]: the gradients of the samples `own`."""
        raise NotImplementedError

    def sums(self, norm: bool, direction: Tensor | None, total: bool) -> PartSums:
        return PartSums(
            self.sqnorm() if norm else None,
            None if direction is None else self.dot(direction),
            self.total() if total else None,
        )

    def sqnorm(self) -> Tensor:
        return torch.cat([self.write_out(own).double().square().sum(dim=1) for own in self.blocks()])

    def dot(self, direction: Tensor) -> Tensor:
        """`direction`: of the parameter's shape."""
        flat = direction.flatten().double()
        return torch.cat([self.write_out(own).double() @ flat for own in self.blocks()])

    def total(self) -> Tensor:
        return torch.stack([self.write_out(own).double().sum(dim=0) for own in self.blocks()]).sum(dim=0)

    def blocks(self, elements: int | None = None) -> Iterator[slice]:
        """Slices of samples, `elements` of a temporary for each."""
        return blocks(self.samples, elements or self.parameters, self.device)


class Dense(Part):
    """Gradients that are written out: `gradient` [B, P]."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient.flatten(1)
        self.samples, self.parameters = self.gradient.shape
        self.device = gradient.device

    def write_out(self, own: slice) -> Tensor:
        return self.gradient[own]


class Outer(Part):
    """Sums of products over tokens, the gradient of a matrix in a linear layer or convolution.

    `pairs` of (left [B, g, T, R], right [B, g, T, C]); the parameter is [g, R, C], its gradient Σ_pairs leftᵀ·right.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor | Patches, Tensor | Patches]]) -> None:
        self.pairs = list(pairs)
        left, right = self.pairs[0]
        self.samples, self.groups, _, self.rows = left.shape
        self.columns = right.shape[3]
        self.parameters = self.groups * self.rows * self.columns
        self.tokens = sum(left.shape[2] for left, _ in self.pairs)
        self.device = left.device

    def factors(self, own: slice) -> tuple[Tensor, Tensor]:
        lefts, rights = zip(*((left[own], right[own]) for left, right in self.pairs), strict=True)
        return (lefts[0], rights[0]) if len(lefts) == 1 else (torch.cat(lefts, dim=2), torch.cat(rights, dim=2))

    def factor_blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        views = len(self.pairs) == 1 and all(isinstance(x, Tensor) for x in self.pairs[0])
        elements = self.groups * self.tokens * (self.rows + self.columns)
        for own in [slice(None)] if views else self.blocks(elements):
            yield self.factors(own)

    def write_out(self, own: slice) -> Tensor:
        left, right = self.factors(own)
        return (left.to(right.dtype).mT @ right).flatten(1)

    def sums(self, norm: bool, direction: Tensor | None, total: bool) -> PartSums:
        if total and self._in_strips:
            return self._sums_of_strips(norm, direction)
        if norm and direction is not None and self.groups == 1:
            matrix = direction.reshape(self.rows, self.columns)
            both = [linear_grad_sqnorm_dot(b.squeeze(1), a.squeeze(1), matrix) for a, b in self.factor_blocks()]
            sqnorm, dot = (torch.cat(parts).double() for parts in zip(*both, strict=True))
            return PartSums(sqnorm, dot, self.total() if total else None)
        return super().sums(norm, direction, total)

    def sqnorm(self) -> Tensor:
        return torch.cat(
            [
                linear_grad_sqnorm(right.flatten(0, 1), left.flatten(0, 1), False).double().view(-1, self.groups).sum(1)
                for left, right in self.factor_blocks()
            ]
        )

    def dot(self, direction: Tensor) -> Tensor:
        direction = direction.reshape(self.groups, self.rows, self.columns)
        parts = []
        for left, right in self.factor_blocks():
            if self.groups == 1:
                parts.append(linear_grad_dot(right.squeeze(1), left.squeeze(1), direction[0]).double())
            else:
                parts.append((((left.to(direction) @ direction) * right).sum(dim=3).double()).sum(dim=(1, 2)))
        return torch.cat(parts)

    def total(self) -> Tensor:
        if self._in_strips:  # as in `sums`, so that a total is the same whatever is asked for beside it
            return self._sums_of_strips(False, None).total
        if self.tokens >= MANY_TOKENS:
            return super().total()
        parts = [
            left.double().transpose(0, 1).flatten(1, 2).mT @ right.double().transpose(0, 1).flatten(1, 2)
            for left, right in self.factor_blocks()
        ]
        return torch.stack(parts).sum(dim=0).flatten()

    @property
    def _in_strips(self) -> bool:
        return self.tokens >= MANY_TOKENS and self.groups == 1 and self.device.type == "cpu"

    def _sums_of_strips(self, norm: bool, direction: Tensor | None) -> PartSums:
        """Each sample's product is made once for all sums, in strips that stay in a core's cache."""
        total = torch.zeros(self.rows, self.columns, dtype=torch.float64)
        height = max(1, min(self.rows, STRIP // self.columns))
        strips = [slice(start, start + height) for start in range(0, self.rows, height)]
        sqnorm, dot = torch.zeros(2, self.samples, dtype=torch.float64)
        for own in self.blocks(self.tokens * (self.rows + self.columns)):
            left, right = (x.squeeze(1) for x in self.factors(own))
            dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
            left, right = left.to(dtype).mT, right.to(dtype)
            along = None if direction is None else direction.reshape(total.shape).to(dtype)
            for strip in strips:
                sums, rows = total[strip], left[:, strip]
                product, wide = torch.empty_like(sums, dtype=dtype), torch.empty_like(sums)
                flat = product.view(-1)
                for i in range(len(left)):
                    torch.mm(rows[i], right[i], out=product)
                    sums += wide.copy_(product)  # twice as fast as adding across dtypes
                    if norm:
                        sqnorm[own.start + i] += torch.dot(flat, flat)
                    if along is not None:
                        dot[own.start + i] += torch.dot(flat, along[strip].reshape(-1))
        return PartSums(sqnorm if norm else None, None if direction is None else dot, total.flatten())


class Scatter(Part):
    """Rows added to a table, the gradient of an embedding: `index` [B, T], `gradient` [B, T, D], table [V, D]."""

    def __init__(self, index: Tensor, gradient: Tensor, table: torch.Size) -> None:
        self.index, self.gradient, self.table = index, gradient, table
        self.samples, self.parameters, self.device = len(index), table.numel(), gradient.device

    def write_out(self, own: slice) -> Tensor:
        index, gradient = self.index[own], self.gradient[own]
        rows = index + torch.arange(len(index), device=self.device)[:, None] * self.table[0]
        return _add_rows(rows, gradient, len(index) * self.table[0]).view(len(index), -1)

    def sqnorm(self) -> Tensor:
        parts = []
        for own in self.blocks(self.gradient[0].numel()):
            index, gradient = self.index[own], self.gradient[own]
            sample = torch.arange(len(index), device=self.device)[:, None]
            hit, inverse = torch.unique(index + sample * self.table[0], return_inverse=True)
            rows = _add_rows(inverse, gradient, len(hit))  # tokens that hit one row of the table add up first
            sample = torch.div(hit, self.table[0], rounding_mode="floor")
            parts.append(_add_rows(sample, rows.double().square().sum(dim=1, keepdim=True), len(index))[:, 0])
        return torch.cat(parts)

    def dot(self, direction: Tensor) -> Tensor:
        parts, direction = [], direction.reshape(self.table)
        for own in self.blocks(self.gradient[0].numel()):
            parts.append((direction[self.index[own]] * self.gradient[own]).sum(dim=2).double().sum(dim=1))
        return torch.cat(parts)

    def total(self) -> Tensor:
        return _add_rows(self.index, self.gradient.double(), self.table[0]).flatten()


class Aligned(Part):
    """The parameter has rows of its own for each sample: `gradient`, of its shape, has the batch at `layout`."""

    def __init__(self, gradient: Tensor, layout: Layout, rows: int, samples: int) -> None:
        self.gradient, self.layout, self.rows, self.samples = gradient, layout, rows, samples
        self.parameters, self.device = gradient.numel(), gradient.device

    def write_out(self, own: slice) -> Tensor:
        numbers = range(self.samples)[own]
        result = self.gradient.new_zeros(len(numbers), *self.gradient.shape)
        rows_first = batch_first(self.gradient, self.layout, self.rows)
        for one, sample in zip(result, numbers, strict=True):
            rows = slice(sample * self.rows // self.samples, (sample + 1) * self.rows // self.samples)
            batch_first(one, self.layout, self.rows)[rows] = rows_first[rows]
        return result.flatten(1)


class Through(Part):
    """A part for `value`, which was computed from the parameter `leaf` alone: taken back by autograd."""

    def __init__(self, part: Part, value: Tensor, leaf: Tensor) -> None:
        self.part, self.value, self.leaf = part, value, leaf
        self.samples, self.parameters, self.device = part.samples, leaf.numel(), leaf.device

    def write_out(self, own: slice) -> Tensor:
        gradient = self.part.write_out(own).to(self.value.dtype)
        gradient = gradient.view(len(gradient), *self.value.shape)
        [result] = torch.autograd.grad(
            self.value, self.leaf, gradient, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        return (
            gradient.new_zeros(len(gradient), self.parameters) if result is None else result.reshape(len(gradient), -1)
        )

    def blocks(self, elements: int | None = None) -> Iterator[slice]:
        return super().blocks(self.parameters + self.value.numel())


class Patches:
    """[B, g, L, C]: what a convolution's window sees at its L places, unfolded a few samples at a time."""

    def __init__(
        self,
        input: Tensor,  # [B·J, C, *space]
        samples: int,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
        places: Sequence[int],  # as many of them as the output has
    ) -> None:
        self.input, self.kernel, self.stride, self.padding, self.dilation = input, kernel, stride, padding, dilation
        self.places, self.device = places, input.device
        self.folded = len(input) // samples
        length = self.folded * math.prod(places)
        self.shape = (samples, groups, length, input.shape[1] // groups * math.prod(kernel))

    def __getitem__(self, own: slice) -> Tensor:
        numbers = range(self.shape[0])[own]
        input = self.input[numbers.start * self.folded : numbers.stop * self.folded]
        sides = [side for pair in reversed(self.padding) for side in pair]
        windows = F.pad(input, sides) if any(sides) else input
        for dim, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            windows = windows.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
            windows = windows.narrow(dim, 0, self.places[dim - 2])
        n = len(self.kernel)
        windows = windows.unflatten(1, (self.shape[1], -1)).unflatten(0, (-1, self.folded))  # [b, J, g, c, *L, *k]
        order = (0, 2, 1, *range(4, 4 + n), 3, *range(4 + n, 4 + 2 * n))
        return windows.permute(order).reshape(len(numbers), *self.shape[1:])


def part_sums(parts: Sequence[Part], norm: bool, direction: Tensor | None, total: bool) -> PartSums:
    """The sums over all parts of one parameter: parts are added first, then squared."""
    parts = _merged(parts)
    if len(parts) == 1:
        return parts[0].sums(norm, direction, total)
    each = [part.sums(False, direction, total) for part in parts]
    return PartSums(
        _sqnorm_of_sum(parts) if norm else None,
        None if direction is None else torch.stack([x.dot for x in each]).sum(dim=0),
        torch.stack([x.total for x in each]).sum(dim=0) if total else None,
    )


def blocks(samples: int, elements: int, device: torch.device) -> Iterator[slice]:
    """Slices over `samples`, of so many that `elements` of each fit into one block."""
    step = max(1, (BLOCK if device.type == "cpu" else 16 * BLOCK) // max(1, elements))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Parts of one kind joined into one, where they can be."""
    merged: list[Part] = []
    by_kind = sorted(parts, key=lambda part: (type(part).__name__, getattr(part, "groups", 0)))
    for (kind, _), same in groupby(by_kind, key=lambda part: (type(part), getattr(part, "groups", 0))):
        same = list(same)
        if len(same) == 1:
            merged += same
        elif kind is Dense:
            merged.append(Dense(torch.stack([part.gradient for part in same]).sum(dim=0)))
        elif kind is Scatter:
            index, gradient = (torch.cat([getattr(p, name) for p in same], dim=1) for name in ("index", "gradient"))
            merged.append(Scatter(index, gradient, same[0].table))
        elif kind is Outer and len({part.rows for part in same}) == 1:
            merged.append(Outer([pair for part in same for pair in part.pairs]))
        else:
            merged += same
    return merged


def _sqnorm_of_sum(parts: list[Part]) -> Tensor:
    first, last = parts[0], parts[-1]
    tied = len(parts) == 2 and isinstance(first, Outer) and isinstance(last, Scatter)
    if tied and first.groups == 1 and first.rows == last.table[0]:
        return first.sqnorm() + last.sqnorm() + 2 * _table_product(first, last)
    sqnorms = []
    for own in blocks(first.samples, len(parts) * first.parameters, first.device):
        sqnorms.append(sum(part.write_out(own).double() for part in parts).square().sum(dim=1))
    return torch.cat(sqnorms)


def _table_product(outer: Outer, scatter: Scatter) -> Tensor:
    """[B]: ⟨Σ_t left_t ⊗ right_t, Σ_s 1_(index s) ⊗ gradient_s⟩ = Σ_ts left_t[index s] · ⟨right_t, gradient_s⟩."""
    products = []
    for own in blocks(outer.samples, 4 * outer.tokens * scatter.index.shape[1], outer.device):
        left, right = (x.squeeze(1) for x in outer.factors(own))
        index, gradient = scatter.index[own], scatter.gradient[own]
        picked = left.gather(2, index[:, None, :].expand(-1, left.shape[1], -1))
        dtype = torch.promote_types(right.dtype, gradient.dtype)
        products.append((picked * (right.to(dtype) @ gradient.to(dtype).mT)).double().sum(dim=(1, 2)))
    return torch.cat(products)


def _add_rows(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, D]: row i is the sum of the `rows` [..., D] whose index is i, in the same order on every run."""
    rows = rows.flatten(0, -2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    result = rows.new_zeros(count, rows.shape[-1])
    if result.is_cuda:  # index_add_ adds in no fixed order there
        return result.index_put_((index.flatten(),), rows, accumulate=True)
    return result.index_add_(0, index.flatten(), rows)

"""Cases of the ops behind scores and metrics: linear_grad_*, pairwise_topk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.clip_like import clip_like
from benchmarks.gpu_case import Case, Goal, Scale, Way, normal, ours, relative_error, sample_rows
from diffprune.kernels import (
    linear_grad_dot,
    linear_grad_sqnorm,
    linear_grad_sqnorm_dot,
    pairwise_topk,
)

LAYERS = (("DiT-XL/2 MLP", 1152, 4608), ("DiT-XL/2 projection", 1152, 1152), ("DiT-S/2 MLP", 384, 1536))
"""Linear layers: name, inputs, outputs."""


def linear_grad_dot_cases(scale: Scale) -> Iterator[Case]:
    """bfloat16 tokens of a batch; the plain product of the same size is what cannot be saved."""
    for name, wide, high in LAYERS:
        b, t = scale.size(64, 2), scale.size(256, 8)
        i, o = scale.size(wide, 16), scale.size(high, 24)

        def make(generator: torch.Generator, b=b, t=t, i=i, o=o) -> tuple:
            sizes = ((b, t, i), (b, t, o), (o, i))
            return tuple(normal(generator, *size, dtype=torch.bfloat16) for size in sizes)

        def check(inputs: tuple, dot: Tensor) -> float:
            a, g, m = inputs
            rows = sample_rows(len(a), 8, a.device)
            expected = linear_grad_dot(a[rows].double(), g[rows].double(), m.double(), impl="reference")
            return relative_error(dot[rows], expected)

        def ways(check: Callable = check) -> list[Way]:
            return [
                *ours(scale, "linear_grad_dot", lambda impl, *x: linear_grad_dot(*x, impl=impl), check, 1e-3),
                Way("matmul of the same size", lambda a, g, m: a.flatten(0, 1) @ m.mT),
                Way("matmul, then product and sum", lambda a, g, m: ((a @ m.mT) * g).sum(dim=(1, 2)), False, check),
            ]

        goal = Goal("80% of the plain matmul's rate", "faster", 0.8, ("matmul of the same size",))
        moved = 2 * (b * t * (i + o) + o * i) + 4 * b
        shape = {"B": b, "T": t, "I": i, "O": o}
        yield Case("linear_grad_dot", name, shape, "bfloat16", make, ways, moved, 2 * b * t * i * o, (goal,))


def linear_grad_sqnorm_cases(scale: Scale) -> Iterator[Case]:
    """bfloat16 tokens of a batch; operations of the cheaper of the two forms, of a Gram matrix one triangle."""
    for name, wide, high in LAYERS:
        b, t = scale.size(256, 2), scale.size(256, 8)
        i, o = scale.size(wide, 16), scale.size(high, 24)

        def make(generator: torch.Generator, b=b, t=t, i=i, o=o) -> tuple:
            return tuple(normal(generator, b, t, n, dtype=torch.bfloat16) for n in (i, o))

        def check(inputs: tuple, sqnorm: Tensor) -> float:
            a, g = inputs
            rows = sample_rows(len(a), 8, a.device)
            expected = linear_grad_sqnorm(a[rows].double(), g[rows].double(), True, impl="reference")
            return relative_error(sqnorm[rows], expected)

        def ways(check: Callable = check) -> list[Way]:
            run = lambda impl, *x: linear_grad_sqnorm(*x, True, impl=impl)  # noqa: E731
            plain = Way("einsum, materialised", _materialised_sqnorm, False, check)
            return [*ours(scale, "linear_grad_sqnorm", run, check, 1e-3), plain]

        operations = b * min(t * (t + 1) * (i + o), 2 * t * i * o)
        goal = Goal("70% of the bound", "bound", 0.7)
        shape = {"B": b, "T": t, "I": i, "O": o}
        moved = 2 * b * t * (i + o) + 4 * b
        yield Case("linear_grad_sqnorm", name, shape, "bfloat16", make, ways, moved, operations, (goal,))


def linear_grad_sqnorm_dot_cases(scale: Scale) -> Iterator[Case]:
    """bfloat16 tokens of a batch, the direction in float32 as MoSo has it, and in bfloat16; against the two ops."""
    for name, wide, high, tokens, dtype in (
        ("DiT-XL/2 MLP", 1152, 4608, 256, torch.float32),
        ("DiT-XL/2 MLP", 1152, 4608, 256, torch.bfloat16),
        ("DiT-XL/2 projection", 1152, 1152, 1024, torch.bfloat16),
        ("DiT-XL/2 final", 1152, 32, 256, torch.float32),
    ):
        b, t = scale.size(64, 2), scale.size(tokens, 8)
        i, o = scale.size(wide, 16), scale.size(high, 24)

        def make(generator: torch.Generator, b=b, t=t, i=i, o=o, dtype=dtype) -> tuple:
            a, g = (normal(generator, b, t, n, dtype=torch.bfloat16) for n in (i, o))
            return a, g, normal(generator, o, i, dtype=dtype)

        def check(inputs: tuple, output: Any) -> float:
            a, g, m = inputs
            rows = sample_rows(len(a), 8, a.device)
            expected = linear_grad_sqnorm_dot(a[rows].double(), g[rows].double(), m.double(), impl="reference")
            return max(relative_error(x[rows], y) for x, y in zip(output, expected, strict=True))

        def ways(check: Callable = check) -> list[Way]:
            run = lambda impl, *x: linear_grad_sqnorm_dot(*x, impl=impl)  # noqa: E731
            own = list(ours(scale, "linear_grad_sqnorm_dot", run, check, 1e-3))
            return [*own, *(Way(f"two ops, {way.name}", _two_ops(way.name), missing=way.missing) for way in own)]

        goal = Goal("no slower than the two ops", "faster", 1.0, ("two ops",))
        moved = 2 * b * t * (i + o) + dtype.itemsize * o * i + 8 * b
        label = f"{name}, {_name(dtype)} direction"
        shape = {"B": b, "T": t, "I": i, "O": o}
        yield Case("linear_grad_sqnorm_dot", label, shape, "bfloat16", make, ways, moved, 2 * b * t * i * o, (goal,))


def pairwise_topk_cases(scale: Scale) -> Iterator[Case]:
    """Neighbours of points like embeddings among others of the kind."""
    n, d, k = scale.size(32768, 40), scale.size(768, 24), 4

    def make(generator: torch.Generator) -> tuple:
        points, _ = clip_like(generator, 2 * n, scale.size(1000, 7), d)
        return points[:n], points[n:]

    def chosen(inputs: tuple, output: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 distances of some rows' neighbours that were chosen, those of the nearest; and those rows."""
        queries, points = inputs
        rows = sample_rows(n, 64, points.device)
        some = queries[rows].double()
        expected, _ = pairwise_topk(some, points.double(), k, impl="reference")
        return (points[output[1][rows].long()].double() - some[:, None]).square().sum(dim=2).sqrt(), expected, rows

    def check(inputs: tuple, output: Any) -> float:
        found, expected, rows = chosen(inputs, output)
        another = relative_error(found, expected) > 1e-12
        return torch.inf if another else relative_error(output[0][rows], expected)

    def check_plain(inputs: tuple, output: Any) -> float:  # float32 may choose others: by how much they are farther
        return relative_error(*chosen(inputs, output)[:2])

    def ways() -> list[Way]:
        run = lambda impl, *x: pairwise_topk(*x, k, impl=impl)  # noqa: E731
        plain = Way("cdist and topk", lambda q, p: _cdist_topk(q, p, k), False, check_plain)
        return [*ours(scale, "pairwise_topk", run, check, 1e-6), plain]

    moved = 4 * 2 * n * d + 12 * n * k
    shape = {"N": n, "M": n, "D": d, "k": k}
    yield Case("pairwise_topk", "float32", shape, "float32", make, ways, moved, 2 * n * n * d)


def _two_ops(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda a, g, m: (linear_grad_sqnorm(a, g, False, impl=impl), linear_grad_dot(a, g, m, impl=impl))


def _materialised_sqnorm(a: Tensor, g: Tensor) -> Tensor:
    """In parts of 64 samples: the gradients of 256 take 2.7 GB, their squares in float32 twice that."""
    parts = []
    for x, y in zip(a.split(64), g.split(64), strict=True):
        gradient = torch.einsum("bto,bti->boi", y, x)
        bias = y.sum(dim=1, dtype=torch.float32).square().sum(dim=1)
        parts.append(torch.linalg.vector_norm(gradient, dim=(1, 2), dtype=torch.float32).square() + bias)
    return torch.cat(parts)


def _cdist_topk(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = [torch.cdist(part, points).topk(k, largest=False) for part in queries.split(2**13)]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

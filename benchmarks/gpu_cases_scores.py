"""Cases of the ops behind scores and clusters: linear_grad_*, kmeans_*, pairwise_topk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.clip_like import clip_like
from benchmarks.gpu_case import Case, Goal, Scale, Way, normal, ours, relative_error, sample_rows
from diffprune.kernels import (
    kmeans_assign,
    kmeans_update,
    kmeans_update_delta,
    linear_grad_dot,
    linear_grad_sqnorm,
    linear_grad_sqnorm_dot,
    pairwise_topk,
    report,
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


def kmeans_assign_cases(scale: Scale) -> Iterator[Case]:
    """Points like embeddings of images, of which the products do not decide all; centroids are float32.

    As in a round of k-means: the host does not wait to look at the centroids.
    """
    n, d = scale.size(1_280_000, 300), scale.size(768, 24)
    for dtype, many in ((torch.float16, 1000), (torch.float32, 1000), (torch.float16, 10_000)):
        k = scale.size(many, 7 if many == 1000 else 40)
        points_bytes = n * d * dtype.itemsize

        def make(generator: torch.Generator, dtype: torch.dtype = dtype, k: int = k) -> tuple:
            return clip_like(generator, n, k, d, dtype)

        def ways() -> list[Way]:
            run = lambda impl, *x: kmeans_assign(*x, impl=impl, check_values=False)  # noqa: E731
            exact = list(ours(scale, "kmeans_assign", run, _check_assignment, 1e-5))
            # labels of a comparison may differ: its error says by how much, and its speed is still reported
            flash = None if find_spec("flash_kmeans") else "needs the package flash-kmeans"
            return [
                *exact,
                *_by_int8(scale),
                Way("flash-kmeans", _flash_kmeans(), False, _check_labels, missing=flash),
                Way("matmul and argmin", _matmul_argmin, False, _check_labels),
                Way("cdist and min", _cdist_min, False, _check_labels),
                Way("matmul of the same size", lambda x, c: x @ c.to(x.dtype).mT),
            ]

        goals = (
            Goal("75% of the fp16 matmul rate", "matmul", 0.75),
            Goal("2 times flash-kmeans", "faster", 2.0, ("flash-kmeans",)),
        )
        label = f"{_name(dtype)} points{f', K={many}' * (many > 1000)}"
        shape = {"N": n, "D": d, "K": k}
        moved = points_bytes + 4 * k * d + 8 * n
        yield Case("kmeans_assign", label, shape, _name(dtype), make, ways, moved, 2 * n * k * d, goals)


def kmeans_update_cases(scale: Scale) -> Iterator[Case]:
    """The points of kmeans_assign and labels in no order."""
    n, k, d = scale.size(1_280_000, 300), scale.size(1000, 7), scale.size(768, 24)
    for dtype in (torch.float16, torch.float32):

        def make(generator: torch.Generator, dtype: torch.dtype = dtype) -> tuple:
            labels = torch.randint(k, (n,), generator=generator, device=generator.device, dtype=torch.int32)
            return normal(generator, n, d, dtype=dtype), labels

        def check(inputs: tuple, output: Any) -> float:
            points, labels = inputs
            sums, counts = output
            columns = sample_rows(d, 16, points.device)
            expected = torch.zeros(k, len(columns), dtype=torch.float64, device=points.device)
            expected.index_add_(0, labels.long(), points[:, columns].double())
            wrong = not torch.equal(counts.double(), labels.bincount(minlength=k).double())
            return torch.inf if wrong else relative_error(sums[:, columns], expected)

        def ways(check: Callable = check) -> list[Way]:
            run = lambda impl, *x: kmeans_update(*x, k, impl=impl, check_values=False)  # noqa: E731
            plain = Way("index_add_ in float32", lambda x, a: _index_add(x, a, k), False, check)
            return [*ours(scale, "kmeans_update", run, check, 1e-10), plain]

        goal = Goal("under a quarter of kmeans_assign", "part", 0.25, ("kmeans_assign",))
        moved = n * d * dtype.itemsize + 4 * n + 8 * k * (d + 1)
        shape = {"N": n, "D": d, "K": k}
        yield Case("kmeans_update", f"{_name(dtype)} points", shape, _name(dtype), make, ways, moved, 0, (goal,))


def kmeans_update_delta_cases(scale: Scale) -> Iterator[Case]:
    """A tenth of the points of kmeans_update change their label; against the sums of all."""
    n, k, d = scale.size(1_280_000, 300), scale.size(1000, 7), scale.size(768, 24)

    def make(generator: torch.Generator) -> tuple:
        points = normal(generator, n, d, dtype=torch.float16)
        old = torch.randint(k, (n,), generator=generator, device=generator.device, dtype=torch.int32)
        new = torch.where(torch.arange(n, device=generator.device) % 10 == 0, (old + 1) % k, old)
        sums = torch.cat([_column_sums(points, old, k, part) for part in range(0, d, 64)], dim=1)
        return points, old, new, sums, old.bincount(minlength=k)

    def check(inputs: tuple, output: Any) -> float:
        points, _, new, _, _ = inputs
        sums, counts = output
        expected = _column_sums(points, new, k, 0)
        wrong = not torch.equal(counts, new.bincount(minlength=k))
        return torch.inf if wrong else relative_error(sums[:, :64], expected)

    def ways() -> list[Way]:
        run = lambda impl, *x: kmeans_update_delta(*x, impl=impl)  # noqa: E731
        whole = lambda impl: lambda x, old, new, *_: kmeans_update(x, new, k, impl=impl, check_values=False)  # noqa: E731
        own = list(ours(scale, "kmeans_update_delta", run, check, 1e-10))
        return [
            *own,
            *(Way(f"kmeans_update of all, {w.name}", whole(w.name), False, check, missing=w.missing) for w in own),
        ]

    moved = n // 10 * d * 2 + 8 * n + 2 * 8 * k * (d + 1)
    yield Case("kmeans_update_delta", "float16 points, a tenth moved", {"N": n, "D": d, "K": k}, "float16", make, ways,
               moved, 0)  # fmt: skip


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


def _check_assignment(inputs: tuple, output: Any) -> float:
    """Error of the distances; infinite if a label is not the nearest."""
    points, centroids = inputs
    assignment, sqdistance = output
    rows = sample_rows(len(points), 4096, points.device)
    nearest, expected = kmeans_assign(points[rows].double(), centroids.double(), impl="reference")
    labels = assignment[rows].long()
    if not bool(((labels >= 0) & (labels < len(centroids))).all()):
        return torch.inf
    chosen = (points[rows].double() - centroids[labels].double()).square().sum(dim=1)
    other = assignment[rows] != nearest
    if bool((other & (chosen > expected * (1 + 1e-12))).any()):
        return torch.inf
    return relative_error(sqdistance[rows], expected)


def _by_int8(scale: Scale) -> Iterator[Way]:
    """Triton's, its products in int8: twice the rate of float16's, more rows to search again in float64."""
    if "triton" in scale.implementations:

        def run(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
            from diffprune.kernels.triton import kmeans_assign as implementation

            return implementation.run(points, centroids, torch.int8)

        yield Way("triton by int8", run, True, _check_assignment, 1e-5, report()["kmeans_assign"]["triton"])


def _column_sums(points: Tensor, labels: Tensor, k: int, first: int) -> Tensor:
    """[k, at most 64] float64: sums of the points of each label, of 64 columns."""
    columns = points[:, first : first + 64].double()
    return torch.zeros(k, columns.shape[1], dtype=torch.float64, device=points.device).index_add_(0, labels, columns)


def _check_labels(inputs: tuple, labels: Tensor) -> float:
    """Share of the labels that are not the nearest centroid's."""
    points, centroids = inputs
    rows = sample_rows(len(points), 4096, points.device)
    nearest, _ = kmeans_assign(points[rows].double(), centroids.double(), impl="reference")
    return float((labels[rows] != nearest).double().mean())


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


def _flash_kmeans() -> Callable[..., Tensor]:
    """Its assignment alone; the points' norms, which it computes once per clustering, are left out of the time."""
    norms: dict[int, Tensor] = {}

    def run(points: Tensor, centroids: Tensor) -> Tensor:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        if points.data_ptr() not in norms:
            norms[points.data_ptr()] = points.float().square().sum(dim=1)
        sqnorm = norms[points.data_ptr()]
        return euclid_assign_triton(points[None], centroids.to(points.dtype)[None], sqnorm[None])[0]

    return run


def _matmul_argmin(points: Tensor, centroids: Tensor) -> Tensor:
    half = centroids.square().sum(dim=1).to(points.dtype) / 2
    product = centroids.to(points.dtype).mT
    return torch.cat([torch.addmm(half, part, product, alpha=-1).argmin(dim=1) for part in points.split(2**17)])


def _cdist_min(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part.float(), centroids).min(dim=1).indices for part in points.split(2**17)])


def _index_add(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(k, points.shape[1], dtype=torch.float32, device=points.device)
    return sums.index_add_(0, labels, points.float()), labels.bincount(minlength=k)


def _cdist_topk(queries: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = [torch.cdist(part, points).topk(k, largest=False) for part in queries.split(2**13)]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

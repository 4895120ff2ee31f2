"""Cases of k-means: assignment, sums, and whole rounds of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.clip_like import clip_like
from benchmarks.gpu_case import Case, Goal, Scale, Way, normal, ours, relative_error, sample_rows
from diffprune.kernels import kmeans_assign, kmeans_update, kmeans_update_delta, report


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
                Way("flash-kmeans", _Flash().assign, False, _check_labels, missing=flash),
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


def kmeans_round_cases(scale: Scale) -> Iterator[Case]:
    """A round of k-means: every point's label, and the means of the points of each. The bytes and operations are the
    assignment's and, once more, the points."""
    n, d = scale.size(1_280_000, 300), scale.size(768, 24)
    for many in (1000, 10_000):
        k = scale.size(many, 7 if many == 1000 else 40)

        def make(generator: torch.Generator, k: int = k) -> tuple:
            return clip_like(generator, n, k, d, torch.float16)

        def check(inputs: tuple, output: tuple[Tensor, Tensor]) -> float:
            wrong = _check_labels(inputs, output[0])
            return torch.inf if wrong else _check_means(inputs, output)

        def ways(check: Callable = check) -> list[Way]:
            flash = None if find_spec("flash_kmeans") else "needs the package flash-kmeans"
            cupy = None if find_spec("cupy") and scale.device.type == "cuda" else "needs the package cupy and a GPU"
            share = lambda inputs, output: _check_labels(inputs, output[0])  # noqa: E731
            return [
                *ours(scale, "kmeans_assign", _round, check, 1e-5),
                Way("flash-kmeans", _Flash().round, False, share, missing=flash),
                Way("cdist and index_add_", _cdist_round, False, share),
                Way("CuPy", _cupy_round, False, share, missing=cupy),
            ]

        goal = Goal("2 times flash-kmeans", "faster", 2.0, ("flash-kmeans",))
        shape = {"N": n, "D": d, "K": k}
        moved = 2 * n * d * 2 + 4 * k * d * 2 + 8 * n
        label = f"float16 points{f', K={many}' * (many > 1000)}"
        yield Case("kmeans_round", label, shape, "float16", make, ways, moved, 2 * n * k * d, (goal,))


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


def _check_labels(inputs: tuple, labels: Tensor) -> float:
    """Share of the labels that are not the nearest centroid's."""
    points, centroids = inputs
    rows = sample_rows(len(points), 4096, points.device)
    nearest, _ = kmeans_assign(points[rows].double(), centroids.double(), impl="reference")
    return float((labels[rows] != nearest).double().mean())


def _check_means(inputs: tuple, output: tuple[Tensor, Tensor]) -> float:
    """Of some columns, against sums in float64; of a cluster without points, the old centroid."""
    points, centroids = inputs
    labels, means = output
    columns = sample_rows(points.shape[1], 16, points.device)
    sums = torch.zeros(len(centroids), len(columns), dtype=torch.float64, device=points.device)
    sums.index_add_(0, labels.long(), points[:, columns].double())
    counts = labels.bincount(minlength=len(centroids))[:, None]
    return relative_error(means[:, columns], torch.where(counts > 0, sums / counts, centroids[:, columns].double()))


def _round(impl: str, points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    labels, _ = kmeans_assign(points, centroids, impl=impl, check_values=False)
    sums, counts = kmeans_update(points, labels, len(centroids), impl=impl, check_values=False)
    return labels, torch.where(counts[:, None] > 0, sums / counts[:, None], centroids).float()


def _cdist_round(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    labels = _cdist_min(points, centroids)
    sums, counts = _index_add(points, labels, len(centroids))
    return labels, torch.where(counts[:, None] > 0, sums / counts[:, None], centroids)


def _cupy_round(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """As it is written by hand: products in blocks, and an atomic addition of every number."""
    import cupy
    import cupyx

    with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        x, c = cupy.from_dlpack(points), cupy.from_dlpack(centroids)
        half, narrow = (c * c).sum(axis=1) / 2, c.astype(x.dtype)
        blocks = [x[start : start + 2**17] for start in range(0, len(x), 2**17)]
        labels = cupy.concatenate([(block @ narrow.T - half).argmax(axis=1) for block in blocks])
        sums = cupy.zeros(c.shape, dtype=cupy.float32)
        for start, block in zip(range(0, len(x), 2**17), blocks, strict=True):
            cupyx.scatter_add(sums, labels[start : start + 2**17], block.astype(cupy.float32))
        counts = cupy.bincount(labels, minlength=len(c))[:, None]
        means = cupy.where(counts > 0, sums / cupy.maximum(counts, 1), c)
        return torch.from_dlpack(labels), torch.from_dlpack(means)


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


class _Flash:
    """flash-kmeans; the points' norms, which it computes once per clustering, are left out of the time."""

    def __init__(self) -> None:
        self._sqnorms: dict[int, Tensor] = {}

    def assign(self, points: Tensor, centroids: Tensor) -> Tensor:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        if points.data_ptr() not in self._sqnorms:
            self._sqnorms[points.data_ptr()] = points.float().square().sum(dim=1)
        sqnorm = self._sqnorms[points.data_ptr()]
        return euclid_assign_triton(points[None], centroids.to(points.dtype)[None], sqnorm[None])[0]

    def round(self, points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        from flash_kmeans.centroid_update_triton import triton_centroid_update_sorted_euclid

        labels, given = self.assign(points, centroids), centroids.to(points.dtype)
        return labels, triton_centroid_update_sorted_euclid(points[None], labels[None], given[None])[0]


def _matmul_argmin(points: Tensor, centroids: Tensor) -> Tensor:
    half = centroids.square().sum(dim=1).to(points.dtype) / 2
    product = centroids.to(points.dtype).mT
    return torch.cat([torch.addmm(half, part, product, alpha=-1).argmin(dim=1) for part in points.split(2**17)])


def _cdist_min(points: Tensor, centroids: Tensor) -> Tensor:
    return torch.cat([torch.cdist(part.float(), centroids).min(dim=1).indices for part in points.split(2**17)])


def _index_add(points: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(k, points.shape[1], dtype=torch.float32, device=points.device)
    return sums.index_add_(0, labels, points.float()), labels.bincount(minlength=k)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""On a GPU the host waits for nothing that it does not have to know: counted on the CPU."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from op_cases import OPS, arguments, run
from torch import Tensor
from triton_case import DEVICE
from waits import waits

import diffprune.kmeans_lloyd
import diffprune.kmeans_sums
from diffprune.kernels import kmeans_assign, kmeans_update, report
from diffprune.kmeans_lloyd import Lloyd
from diffprune.kmeans_points import open_points

LOOKS = {
    "kmeans_assign": "finite centroids",
    "kmeans_update": "labels in range",
    "kmeans_update_delta": "labels in range, and how many moved",
    "knn_radius": "finite points",
    "pairwise_topk": "finite points",
}
"""Ops that look at values: what they promise to refuse."""

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="counts operations on the CPU")


def points(n: int = 90, d: int = 7) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_what_would_wait_is_counted() -> None:
    x = points()
    mask = x > 0
    for action in (lambda: x.sum().item(), lambda: bool(mask.any()), lambda: x[mask], lambda: mask.nonzero(),
                   lambda: x.__setitem__(mask, 0.0), lambda: kmeans_assign(x, x[:3], impl="triton")):  # fmt: skip
        with waits() as found:
            action()
        assert found, action
    with waits() as found:
        torch.where(mask, x, 0.0).sum(dim=1).cumsum(0)[x.argmax(dim=0)]
    assert found == []


@pytest.mark.parametrize("op", OPS)
def test_ops_on_a_gpu(op: str) -> None:
    """None waits but those that look at values; these do not either where that is switched off."""
    if "triton" not in report()[op if op != "knn_radius" else "pairwise_topk"]:
        pytest.skip("no Triton form")
    given = arguments(op)
    with waits() as found:
        run(op, given | {"impl": "triton"})
    assert bool(found) == (op in LOOKS), found
    if op in ("kmeans_assign", "kmeans_update"):
        with waits() as found:
            run(op, given | {"impl": "triton", "check_values": False})
        assert found == []


@pytest.mark.parametrize(
    "dtype, metric, weighted",  # every two of them together, as a round takes seconds in the interpreter
    [
        (torch.float32, "euclidean", False),
        (torch.float32, "cosine", True),
        (torch.float16, "euclidean", True),
        (torch.float16, "cosine", False),
    ],
)
def test_rounds_of_kmeans(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, metric: str, weighted: bool) -> None:
    """Seven of eight rounds as a GPU runs them look at nothing."""
    for module, op in ((diffprune.kmeans_lloyd, kmeans_assign), (diffprune.kmeans_sums, kmeans_update)):
        monkeypatch.setattr(module, op.__name__, partial(op, impl="triton"))
    monkeypatch.setattr(diffprune.kmeans_sums, "_in_cpp", lambda values: False)
    data = open_points(points().to(dtype), metric=metric)
    weights = torch.linspace(0, 2, 90, dtype=torch.float64) if weighted else None
    lloyd = Lloyd(data, 5, 10.0, weights)
    lloyd.check_every = 8
    marks: list[int] = []
    with waits() as found:

        def sweep(centroids: Tensor) -> None:
            marks.append(len(found))
            lloyd._sweep_whole(centroids)

        monkeypatch.setattr(lloyd, "_sweep", sweep)
        fit = lloyd.run(data.take(torch.arange(5)), 9, -1.0)
    assert fit.rounds == 9
    counts = [after - before for before, after in pairwise(marks)]
    assert counts[0] > 0 and counts[8] > 0, "the first round and the ninth look"
    assert counts[1:8] == [0] * 7, found

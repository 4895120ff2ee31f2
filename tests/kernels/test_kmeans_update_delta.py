"""``kmeans_update_delta`` against ``kmeans_update`` of the new assignment."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from triton_bounds import launch

from diffprune.kernels import dispatch, kmeans_update
from diffprune.kernels.kmeans_update_delta import kmeans_update_delta

IMPLS = ["reference", "cpu", "triton"]


def call(impl: str, *args: Tensor) -> tuple[Tensor, Tensor]:
    return launch(kmeans_update_delta, *args) if impl == "triton" else kmeans_update_delta(*args, impl=impl)


def data(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, moving: float = 0.3) -> tuple[Tensor, ...]:
    """Points, the old and the new assignment, and the old sums and counts."""
    generator = torch.Generator().manual_seed(n + k + d)
    points = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    old, other = torch.randint(0, k, (2, n), generator=generator, dtype=torch.int32)
    new = torch.where(torch.rand(n, generator=generator) < moving, other, old)
    return points, old, new, *kmeans_update(points, old, k, impl="reference")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (2, 9, 3), (60, 7, 33)])
def test_is_the_update_of_the_new_assignment(impl: str, dtype: torch.dtype, n: int, k: int, d: int) -> None:
    points, old, new, *state = data(n, k, d, dtype)
    sums, counts = call(impl, points, old, new, *state)
    expected, lengths = kmeans_update(points, new, k, impl="reference")
    assert (sums.dtype, counts.dtype) == (torch.float64, torch.int64)
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(counts, lengths)


def test_implementations_agree_to_the_bit() -> None:
    """In sums of values of very different size, so that another order of adding gives other bytes."""
    points, old, new, *state = data(90, 4, 20)
    points = points * torch.logspace(-8, 8, 90)[:, None]
    reference, *others = [call(impl, points, old, new, *state) for impl in IMPLS]
    for sums, counts in others:
        assert torch.equal(sums, reference[0])
        assert torch.equal(counts, reference[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_only_points_that_moved_are_read(impl: str) -> None:
    points, old, new, *state = data(50, 5, 6)
    expected, _ = call(impl, points, old, new, *state)
    points[old == new] = torch.nan
    assert torch.equal(call(impl, points, old, new, *state)[0], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_moved(impl: str) -> None:
    points, old, _, *state = data(20, 5, 6)
    sums, counts = call(impl, points, old, old, *state)
    assert torch.equal(sums, state[0])
    assert torch.equal(counts, state[1])
    sums, counts = call(impl, points[:0], old[:0], old[:0], *state)
    assert torch.equal(sums, state[0])
    assert torch.equal(counts, state[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_point_leaves_a_nan_behind(impl: str) -> None:
    """As the docstring warns: also where the NaN is."""
    points = torch.tensor([[1.0], [torch.nan], [2.0]])
    old, new = torch.tensor([0, 0, 2], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    sums, counts = call(impl, points, old, new, *kmeans_update(points, old, 3, impl="reference"))
    assert sums[:, 0].isfinite().tolist() == [False, False, True]
    assert counts.tolist() == [1, 1, 1]


def test_takes_the_fast_implementation() -> None:
    """ "auto" on the CPU is the blocked form."""
    points, old, new, *state = data(9, 3, 2)
    with patch.object(dispatch._ops["kmeans_update_delta"].implementations["cpu"], "run") as run:
        run.return_value = state[0] + 1, state[1] + 1
        kmeans_update_delta(points, old, new, *state)
    moved = (old != new).nonzero()[:, 0]
    assert torch.equal(run.call_args.args[1], moved)
    assert torch.equal(run.call_args.args[2], old[moved])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(9)}, r"expected points \[N, D\], got \(9,\)"),
        ({1: torch.zeros(9, dtype=torch.int64)}, "expected old_assignment of dtype int32, got torch.int64"),
        ({2: torch.zeros(8, dtype=torch.int32)}, "equal N, got 9 and 9 and 8"),
        ({1: torch.full((9,), 3, dtype=torch.int32)}, "expected old_assignment from 0 to 2, got 3 to 3"),
        ({2: torch.full((9,), -1, dtype=torch.int32)}, "expected new_assignment from 0 to 2, got -1 to -1"),
        ({3: torch.zeros(3, 2)}, "expected sums of dtype float64, got torch.float32"),
        ({3: torch.zeros(3, 4, dtype=torch.float64)}, "points and sums of equal D, got 2 and 4"),
        ({4: torch.zeros(4, dtype=torch.int64)}, "sums and counts of equal K, got 3 and 4"),
        ({4: torch.zeros(3)}, "expected counts of dtype int64, got torch.float32"),
        ({0: torch.ones(9, 2, device="meta")}, "equal device, got meta and cpu"),
        (
            {3: torch.zeros(0, 2, dtype=torch.float64), 4: torch.zeros(0, dtype=torch.int64)},
            r"expected sums \[K, D\] with K at least 1, got \(0, 2\)",
        ),
    ],
)
def test_bad_inputs(change: dict[int, Tensor], message: str) -> None:
    args = [change.get(place, arg) for place, arg in enumerate(data(9, 3, 2))]
    with pytest.raises(ValueError, match=message):
        kmeans_update_delta(*args)


def test_is_a_proper_torch_op() -> None:
    op = torch.ops.diffprune.kmeans_update_delta.default
    torch.library.opcheck(op, data(9, 3, 2))
    torch.library.opcheck(op, (*data(9, 3, 2, torch.float16), "reference"))

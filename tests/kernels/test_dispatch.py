"""Which implementation runs: order, refusals, and what an explicit choice says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffprune.errors import InputError
from diffprune.kernels import dispatch, kmeans_assign, report


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> dispatch.Op:
    monkeypatch.setattr(dispatch, "_ops", {})
    op = dispatch.Op("example")
    op.implementations = {
        "triton": "triton is not installed",
        "cpu": SimpleNamespace(run=lambda x: ("cpu", x), refuse=lambda x: "needs x < 10" if x >= 10 else None),
        "reference": SimpleNamespace(run=lambda x: ("reference", x)),
    }
    return op


def test_auto_takes_the_first_that_does_not_refuse(op: dispatch.Op) -> None:
    assert op("auto", 3) == ("cpu", 3)
    assert op("auto", 10) == ("reference", 10)
    assert op("reference", 3) == ("reference", 3)


@pytest.mark.parametrize(("impl", "value"), [("triton", 3), ("cuda", 3), ("cpu", 10)])
def test_explicit_choice_never_falls_back(op: dispatch.Op, impl: str, value: int) -> None:
    with pytest.raises(NotImplementedError) as error:
        op(impl, value)
    assert str(error.value).splitlines() == [
        f"example: impl={impl!r} cannot run this",
        "  cuda: does not exist for this op",
        "  triton: triton is not installed",
        "  cpp: does not exist for this op",
        "  cpu: needs x < 10" if value == 10 else "  cpu: would run",
        "  reference: would run",
    ]


def test_unknown_name(op: dispatch.Op) -> None:
    with pytest.raises(ValueError, match=r"expected impl to be one of auto, cuda, triton, cpp, cpu, .*got 'gpu'"):
        op("gpu", 3)


def test_report(op: dispatch.Op) -> None:
    assert report() == {"example": {"triton": "triton is not installed", "cpu": None, "reference": None}}


def test_report_of_the_library() -> None:
    found = report()
    ops = ["kmeans_assign", "kmeans_update", "linear_grad_dot", "linear_grad_sqnorm", "pairwise_topk"]
    assert [name for name in found if name in ops] == ops
    for name in ops:
        assert found[name]["reference"] is None
        assert found[name]["cpu"] is None


def test_an_implementation_says_which_device_it_wanted() -> None:
    points = torch.empty(3, 2, device="meta")
    with pytest.raises(NotImplementedError, match="cpu: needs CPU tensors, got meta"):
        dispatch._ops["kmeans_update"]("cpu", points, points[:, 0], 1, None)


@pytest.mark.parametrize("name", sorted(dispatch.UNCONFIRMED))
def test_what_no_gpu_has_confirmed_runs_only_when_asked_for(op, name) -> None:
    op.implementations = {**op.implementations, name: SimpleNamespace(run=lambda x: (name, x))}
    assert op("auto", 3) == ("cpu", 3)
    assert op(name, 3) == (name, 3)


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ("triton", "triton"),
        ("cuda:example, triton", "cuda"),
        ("triton:other", "cpu"),
        ("cuda:other", "cpu"),
        ("", "cpu"),
    ],
)
def test_what_the_user_says_is_confirmed_is_taken(op, monkeypatch, said, taken) -> None:
    dispatch.Op("other")
    for name in dispatch.UNCONFIRMED:
        op.implementations[name] = SimpleNamespace(run=lambda x, name=name: (name, x))
    monkeypatch.setenv(dispatch.CONFIRMED, said)
    monkeypatch.setattr(dispatch, "_emulated", lambda name: False)  # which "auto" never takes
    assert op("auto", 3) == (taken, 3)


@pytest.mark.parametrize("said", ["tritn", "triton:exmaple", "triton:", "cuda example"])
def test_what_is_confirmed_must_exist(op, monkeypatch, said) -> None:
    monkeypatch.setenv(dispatch.CONFIRMED, said)
    with pytest.raises(InputError, match=rf"DIFFPRUNE_CONFIRMED: .*got '{said}'; .*ops: example$"):
        op("auto", 3)
    assert op("cpu", 3) == ("cpu", 3)


def test_op_through_the_public_function() -> None:
    with pytest.raises(NotImplementedError, match="kmeans_assign: impl='cuda' cannot run this\n  cuda: "):
        kmeans_assign(torch.ones(3, 2), torch.ones(1, 2), impl="cuda")

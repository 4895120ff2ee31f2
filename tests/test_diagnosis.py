"""``doctor``: what runs here, why the rest does not, and what no GPU has confirmed."""

from __future__ import annotations

import pytest
import torch

from diffprune import diagnosis
from diffprune.cli.output import show_doctor
from diffprune.kernels import dispatch
from diffprune.kernels.dispatch import UNCONFIRMED


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ops, as on a machine with and without what they need."""
    monkeypatch.setattr(dispatch, "_ops", {})
    plain = dispatch.Op("plain")
    plain.implementations = {"cuda": "needs a CUDA device", "triton": object(), "cpu": object(), "reference": object()}
    other = dispatch.Op("other", preference=("sdpa", *dispatch.PREFERENCE), because="it was measured")
    other.implementations = {"sdpa": object(), "triton": "needs the package triton", "reference": object()}


def test_every_implementation_has_its_word(ops: None) -> None:
    found = diagnosis.doctor()
    assert found["ops"]["plain"] == {
        "cuda": "needs a CUDA device; no GPU has confirmed it yet",
        "triton": "runs when asked for by name; no GPU has confirmed it yet",
        "cpu": "runs",
        "reference": "runs",
    }
    assert found["ops"]["other"]["sdpa"] == "runs"
    assert found["orders"] == {"other": "sdpa, triton, reference: it was measured"}
    assert found["unconfirmed"] == sorted(UNCONFIRMED)


def test_what_the_user_says_is_confirmed_runs(ops: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.CONFIRMED, "triton:plain")
    found = diagnosis.doctor()["ops"]
    assert found["plain"]["triton"] == "runs" and found["plain"]["cuda"].endswith("no GPU has confirmed it yet")
    assert found["other"]["triton"].endswith("no GPU has confirmed it yet")


def test_table(ops: None, capsys: pytest.CaptureFixture[str]) -> None:
    show_doctor(diagnosis.doctor())
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["op", "sdpa", "cuda", "triton", "cpu", "reference"] in lines
    assert ["plain", "no", "(2)", "by", "name", "(3)", "runs", "runs"] in lines
    assert ["other", "runs", "no", "(1)", "runs"] in lines
    assert ["(2)", *["needs", "a", "CUDA", "device;", "no", "GPU", "has", "confirmed", "it", "yet"]] in lines


def test_of_the_library() -> None:
    """Every op runs somewhere here; attention takes PyTorch's own first, and says on what evidence."""
    found = diagnosis.doctor()
    assert set(found["ops"]) >= {"attention", "kmeans_assign", "linear_grad_sqnorm_dot"}
    assert all("runs" in said.values() for said in found["ops"].values())
    assert next(iter(found["ops"]["attention"])) == "sdpa"
    assert (
        found["orders"]["attention"].startswith("sdpa, triton, reference: ")
        and "no GPU has measured" in found["orders"]["attention"]
    )
    if not torch.cuda.is_available():
        assert found["device"].endswith("no CUDA device")
        assert "needs a CUDA device" in found["ops"]["linear_grad_dot"]["cuda"] or "_C" in str(found["ops"])

"""Lets ops run with ``impl="cuda"``: on a GPU if there is one, else their sources on the CPU, see tests/emulator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import emulator
import pytest
import torch

from diffprune.kernels import cuda, dispatch, flow_matching_loss  # noqa: F401 (defines its ops)

OPS = (
    "kmeans_assign",
    "kmeans_update",
    "linear_grad_dot",
    "linear_grad_sqnorm",
    "linear_grad_sqnorm_dot",
    "flow_matching_loss",
    "flow_matching_loss_grad",
)
GPU = torch.cuda.is_available()
HOPPER = GPU and torch.cuda.get_device_capability()[0] == 9


@pytest.fixture
def cuda_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: fails unless the extension was built. Elsewhere the emulated one takes its place, for CPU tensors."""
    if GPU:
        assert cuda.unavailable() is None, cuda.unavailable()
        return
    if reason := emulator.unavailable():
        pytest.skip(f"no GPU, and the emulator {reason}")
    monkeypatch.setattr(cuda, "extension", emulator.load)
    monkeypatch.setattr(cuda, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda, "current_stream", _no_stream)
    emulator.seed(0)
    for op in OPS:
        module = import_module(f"diffprune.kernels.cuda.{op}")
        monkeypatch.setitem(dispatch._ops[op].implementations, "cuda", module)


@pytest.fixture(params=[80, 90], ids=["sm80", "sm90"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda_ops: None) -> int:
    """Each generation of matrix kernels that can run here, in turn."""
    if request.param == 90 and GPU and not HOPPER:
        pytest.skip("the kernels for sm_90a need a Hopper GPU")
    monkeypatch.setattr(cuda, "path", request.param)
    return request.param


@contextmanager
def _no_stream(device: torch.device) -> Iterator[int]:
    yield 0

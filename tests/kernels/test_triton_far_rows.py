"""Triton kernels reach rows whose offsets do not fit into 31 bits, though each stride does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from op_cases import DTYPES, PAIRS, arguments, run
from torch import Tensor
from triton_bounds import within_bounds
from triton_case import DEVICE

COPIED = ("flow_interpolate", "flow_matching_loss", "flow_matching_loss_grad")
"""Their inputs are copied where they are not contiguous."""

READ = [(op, name) for op, name in PAIRS if op not in COPIED and DTYPES.get(name) is None]


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """PyTorch would keep it for this process, and other workers' tests would have none."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize(("op", "name"), READ)
def test_far_rows(op: str, name: str) -> None:
    given = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in arguments(op).items()}
    given["impl"] = "triton"
    given[name] = given[name].half().to(given[name].dtype)
    far = apart(given[name])
    assert max(far.stride()) < 2**31 < sum((n - 1) * step for n, step in zip(far.shape, far.stride(), strict=True))
    with within_bounds():  # a wrong offset is an address in no memory
        results = run(op, given | {name: far})
    for found, expected in zip(results, run(op, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["input", "grad_output", "direction", "bias_direction"])
def test_far_rows_of_one_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffprune.kernels.triton import linear_grad_sqnorm_dot

    monkeypatch.setattr(linear_grad_sqnorm_dot, "at_once", lambda *_: True)
    test_far_rows("linear_grad_sqnorm_dot", name)


def apart(x: Tensor) -> Tensor:
    """The same values, the rows so far apart that the last one is 2³¹ elements from the first. Memory is reserved for
    all of it, and touched where the rows are."""
    rows = x.shape[:-1] if x.dim() > 1 else x.shape
    step = (2**31 // (rows.numel() - 1) // 8 + 1) * 8
    strides = [rows[axis + 1 :].numel() * step for axis in range(len(rows))]
    try:
        whole = torch.empty(rows.numel() * step + 64, dtype=x.dtype, device=x.device)
    except RuntimeError:
        pytest.skip("needs 10 GiB of address space")
    return whole.as_strided(x.shape, (*strides, 1) if x.dim() > 1 else strides).copy_(x)

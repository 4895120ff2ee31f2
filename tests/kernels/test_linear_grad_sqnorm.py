"""``linear_grad_sqnorm`` against autograd in float64, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffprune.kernels import linear_grad_sqnorm
from diffprune.kernels.cpu import linear_grad_sqnorm as blocked

IMPLS = ["reference", "cpu"]


def autograd(input: Tensor, grad_output: Tensor, bias: bool) -> Tensor:
    """[B] float64: the squared gradient norm of a real linear layer, sample by sample."""
    layer = torch.nn.Linear(input.shape[2], grad_output.shape[2], bias=bias, dtype=torch.float64)
    norms = []
    for a, g in zip(input.double(), grad_output.double(), strict=True):
        gradients = torch.autograd.grad((layer(a) * g).sum(), list(layer.parameters()))
        norms.append(sum(gradient.square().sum() for gradient in gradients))
    return torch.stack(norms) if norms else torch.empty(0, dtype=torch.float64)


def check(input: Tensor, grad_output: Tensor, bias: bool, impl: str, rtol: float = 1e-5) -> None:
    sqnorm = linear_grad_sqnorm(input, grad_output, bias, impl=impl)
    double = torch.float64 in (input.dtype, grad_output.dtype)
    assert sqnorm.dtype == (torch.float64 if double else torch.float32)
    torch.testing.assert_close(sqnorm.double(), autograd(input, grad_output, bias), rtol=rtol, atol=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "i", "o"),
    [(1, 1, 1, 1), (5, 1, 33, 17), (3, 7, 64, 96), (4, 96, 5, 3), (3, 50, 16, 7), (2, 64, 256, 192), (6, 13, 1, 40)],
)
def test_odd_sizes(impl: str, bias: bool, b: int, t: int, i: int, o: int) -> None:
    check(normal(b, t, i, seed=1), normal(b, t, o, seed=2), bias, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t", [1, 24, 200])
def test_correlated_tokens(impl: str, t: int) -> None:
    """Tokens of an image resemble one another, and so do their gradients."""
    input = normal(4, 1, 48, seed=1) + 0.05 * normal(4, t, 48, seed=2)
    grad_output = 1e-3 * (normal(4, 1, 64, seed=3) + 0.05 * normal(4, t, 64, seed=4))
    check(input, grad_output, True, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_cancel(impl: str) -> None:
    """As in attention's keys: inputs share a mean and gradients sum to 0; the Gram form alone is wrong then."""
    input = normal(3, 1, 128, seed=1) + 1e-2 * normal(3, 16, 128, seed=2)
    grad_output = normal(3, 16, 96, seed=3)
    grad_output = grad_output - grad_output.mean(dim=1, keepdim=True)
    gram = ((input @ input.mT) * (grad_output @ grad_output.mT)).sum(dim=(1, 2))
    exact = autograd(input, grad_output, False)
    assert ((gram - exact).abs() / exact).max() > 1e-4
    check(input, grad_output, False, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("t", [3, 60])
def test_half_precision_is_upcast(impl: str, dtypes: tuple[torch.dtype, torch.dtype], t: int) -> None:
    check(normal(3, t, 20).to(dtypes[0]), normal(3, t, 30, seed=1).to(dtypes[1]), True, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t", [3, 60])
def test_float64(impl: str, t: int) -> None:
    check(normal(3, t, 20).double(), normal(3, t, 30, seed=1).double(), True, impl, rtol=1e-12)


@pytest.mark.parametrize(("t", "form"), [(1, "_gram"), (10, "_gram"), (12, "_gram"), (13, "_direct"), (99, "_direct")])
def test_takes_the_form_with_fewer_operations(t: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """I=20, O=30. Gram T²·51 against direct (T+1)·600: equal at T = 12.68."""
    other = {"_gram": "_direct", "_direct": "_gram"}[form]
    monkeypatch.setattr(blocked, other, None)
    check(normal(2, t, 20), normal(2, t, 30, seed=1), True, "cpu")


def test_blocks_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 3000)
    check(normal(7, 12, 50), normal(7, 12, 70, seed=1), True, "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str) -> None:
    check(normal(3, 40, 9).mT, normal(3, 22, 9, seed=1).mT[:, :, :20], True, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl: str) -> None:
    assert linear_grad_sqnorm(torch.empty(0, 4, 3), torch.empty(0, 4, 2), True, impl=impl).shape == (0,)
    assert linear_grad_sqnorm(torch.empty(2, 0, 3), torch.empty(2, 0, 2), True, impl=impl).tolist() == [0, 0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t", [2, 60])
def test_nan_and_zero(impl: str, t: int) -> None:
    input, grad_output = normal(3, t, 20), normal(3, t, 30, seed=1)
    input[1, 0, 0] = torch.nan
    grad_output[2] = 0
    sqnorm = linear_grad_sqnorm(input, grad_output, True, impl=impl)
    assert sqnorm.isnan().tolist() == [False, True, False]
    assert sqnorm[2] == 0


@pytest.mark.parametrize(
    ("input", "grad_output", "message"),
    [
        (torch.ones(3, 4), torch.ones(3, 4, 2), r"expected input \[B, T, I\], got \(3, 4\)"),
        (torch.ones(3, 4, 2), torch.ones(3, 2, 4, 2), r"expected grad_output \[B, T, O\], got \(3, 2, 4, 2\)"),
        (torch.ones(3, 4, 2), torch.ones(3, 5, 2), r"of equal B, T, got \(3, 4\) and \(3, 5\)"),
        (torch.ones(3, 4, 2).int(), torch.ones(3, 4, 2), "expected input of dtype float16 or .*int32"),
        (torch.ones(3, 4, 2), torch.ones(3, 4, 2, device="meta"), "equal device, got cpu and meta"),
    ],
)
def test_bad_inputs(input: Tensor, grad_output: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_grad_sqnorm(input, grad_output, True)


def test_is_a_proper_torch_op() -> None:
    op = torch.ops.diffprune.linear_grad_sqnorm.default
    torch.library.opcheck(op, (normal(2, 3, 4), normal(2, 3, 5), True))
    torch.library.opcheck(op, (normal(2, 3, 4).bfloat16(), normal(2, 3, 5), False, "reference"))


def test_keeps_no_graph() -> None:
    input = normal(2, 3, 4).requires_grad_()
    assert not linear_grad_sqnorm(input, normal(2, 3, 5), True).requires_grad

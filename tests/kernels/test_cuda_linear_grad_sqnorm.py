"""CUDA's ``linear_grad_sqnorm`` against float64: on a GPU, or its sources on the CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_case import cuda_ops, launch, path  # noqa: F401
from torch import Tensor

from diffprune.kernels import linear_grad_sqnorm
from diffprune.kernels.cuda import linear_grad_sqnorm as implementation
from diffprune.kernels.cuda.linear_grad_sqnorm import takes_gram

pytestmark = pytest.mark.usefixtures("path")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(input: Tensor, grad_output: Tensor, bias: bool, rtol: float = 3e-6) -> Tensor:
    sqnorm = launch(linear_grad_sqnorm, input, grad_output, bias)
    assert sqnorm.dtype == torch.float32
    a, g = input.double(), grad_output.double()
    expected = torch.einsum("bto,bti->boi", g, a).square().sum(dim=(1, 2))
    if bias:
        expected = expected + g.sum(dim=1).square().sum(dim=1)
    torch.testing.assert_close(sqnorm.double(), expected, rtol=rtol, atol=0)
    return sqnorm


@pytest.fixture(params=[True, False], ids=["gram", "direct"])
def gram(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each form in turn, whatever the sizes."""
    monkeypatch.setattr(implementation, "takes_gram", lambda *_: request.param)
    return request.param


@pytest.mark.parametrize(
    ("b", "t", "i", "o", "dtype", "bias"),
    [
        (1, 2, 1, 1, torch.float16, True),
        (5, 7, 70, 90, torch.bfloat16, False),
        (2, 130, 72, 136, torch.float16, True),  # three tiles of pairs of tokens; two of outputs
        (3, 150, 300, 8, torch.float16, False),  # two tiles of inputs; more steps than one
        (1, 300, 24, 40, torch.bfloat16, True),  # six tiles of pairs
    ],
)
@pytest.mark.usefixtures("gram")
def test_both_forms(b: int, t: int, i: int, o: int, dtype: torch.dtype, bias: bool) -> None:
    check(normal(b, t, i, seed=1, dtype=dtype), normal(b, t, o, seed=2, dtype=dtype), bias)


def test_takes_the_form_with_fewer_operations() -> None:
    """The layers of DiT-XL/2 at 256 tokens, and its first and last ones."""
    assert takes_gram(256, 1152, 3456) and takes_gram(256, 1152, 1152) and takes_gram(256, 4608, 1152)
    assert not takes_gram(256, 1152, 32) and not takes_gram(4096, 1152, 1152)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_one_token(dtype: torch.dtype, bias: bool) -> None:
    check(normal(5, 1, 33, seed=1, dtype=dtype), normal(5, 1, 700, seed=2, dtype=dtype), bias)


def test_cancelling_tokens_are_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal inputs, gradients that sum to nearly 0: the Gram terms are 10^5 times the sum. The others are plain."""
    t, i, o = 64, 136, 72
    monkeypatch.setattr(implementation, "takes_gram", lambda *_: True)
    input, grad_output = normal(4, t, i, seed=1), normal(4, t, o, seed=2)
    for sample in (1, 3):
        input[sample] = normal(i, seed=3) + normal(t, i, seed=1) * 2**-7
        grad_output[sample, 1::2] = -grad_output[sample, ::2]
        check(input, grad_output, bias=False, rtol=2e-5)
    grad_output[1] = 0  # neither form may divide by this
    assert check(input, grad_output, bias=True, rtol=2e-5)[1] == 0


def test_sizes_without_elements() -> None:
    for b, t, i, o in [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (2, 1, 0, 8)]:
        check(normal(b, t, i, seed=1), normal(b, t, o, seed=2), bias=True)


@pytest.mark.usefixtures("gram")
def test_nan_stays_in_its_sample() -> None:
    input, grad_output = normal(3, 130, 40, seed=1), normal(3, 130, 8, seed=2)
    grad_output[1, 129, 7] = torch.nan
    sqnorm = launch(linear_grad_sqnorm, input, grad_output, True)
    assert sqnorm.isnan().tolist() == [False, True, False]


@pytest.mark.usefixtures("gram")
def test_repeats_to_the_bit() -> None:
    tensors = normal(2, 130, 72, seed=1), normal(2, 130, 72, seed=2)
    first, second = (launch(linear_grad_sqnorm, *tensors, True) for _ in range(2))
    assert torch.equal(first, second)


def test_refuses_what_it_cannot_do_exactly() -> None:
    single = normal(1, 2, 8, seed=1, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="cuda: needs float16 or bfloat16, got float32"):
        launch(linear_grad_sqnorm, single, single, True)

"""``linear_grad_dot`` against autograd in float64, one sample at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffprune.kernels import linear_grad_dot
from diffprune.kernels.cpu import linear_grad_dot as blocked

IMPLS = ["reference", "cpu"]


def autograd(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> Tensor:
    """[B] float64: the inner product with the gradient of a real linear layer, sample by sample."""
    layer = torch.nn.Linear(input.shape[2], grad_output.shape[2], bias=bias_direction is not None, dtype=torch.float64)
    directions = [direction] if bias_direction is None else [direction, bias_direction]
    dots = []
    for a, g in zip(input.double(), grad_output.double(), strict=True):
        gradients = torch.autograd.grad((layer(a) * g).sum(), list(layer.parameters()))
        dots.append(sum((gradient * m.double()).sum() for gradient, m in zip(gradients, directions, strict=True)))
    return torch.stack(dots)


def check(
    input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None, impl: str, tol: float = 2e-6
) -> None:
    """Errors are relative to the largest value a dot of such vectors can have, over the root of their dimension."""
    dot = linear_grad_dot(input, grad_output, direction, bias_direction, impl=impl)
    double = torch.float64 in (input.dtype, grad_output.dtype, direction.dtype)
    assert dot.dtype == (torch.float64 if double else torch.float32)
    expected = autograd(input, grad_output, direction, bias_direction)
    gradients = torch.einsum("bto,bti->boi", grad_output.double(), input.double()).flatten(1)
    scale = gradients.norm(dim=1) * direction.double().norm() / direction.numel() ** 0.5
    assert ((dot.double() - expected).abs() <= tol * (expected.abs() + scale)).all()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("b", "t", "i", "o"),
    [(1, 1, 1, 1), (5, 1, 33, 17), (3, 7, 64, 96), (4, 96, 5, 3), (2, 64, 192, 256), (6, 13, 1, 9)],
)
def test_odd_sizes(impl: str, bias: bool, b: int, t: int, i: int, o: int) -> None:
    bias_direction = normal(o, seed=4) if bias else None
    check(normal(b, t, i, seed=1), normal(b, t, o, seed=2), normal(o, i, seed=3), bias_direction, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_with_itself_is_the_squared_norm(impl: str) -> None:
    input, grad_output = normal(1, 30, 40), normal(1, 30, 20, seed=1)
    direction, bias_direction = grad_output[0].T @ input[0], grad_output[0].sum(dim=0)
    dot = linear_grad_dot(input, grad_output, direction, bias_direction, impl=impl)
    expected = direction.double().square().sum() + bias_direction.double().square().sum()
    torch.testing.assert_close(dot.double(), expected[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("narrow", ["input", "output"])
def test_mixed_precision_is_upcast(impl: str, narrow: str) -> None:
    i, o = (12, 30) if narrow == "input" else (30, 12)
    input, grad_output = normal(3, 9, i).bfloat16(), normal(3, 9, o, seed=1).half()
    check(input, grad_output, normal(o, i, seed=2), normal(o, seed=3), impl)
    check(input.double(), grad_output, normal(o, i, seed=2), normal(o, seed=3), impl, tol=1e-13)


def test_blocks_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "BLOCK", 2000)
    check(normal(7, 12, 50), normal(7, 12, 70, seed=1), normal(70, 50, seed=2), normal(70, seed=3), "cpu")


@pytest.mark.parametrize("impl", IMPLS)
def test_empty(impl: str) -> None:
    direction, bias_direction = torch.ones(2, 3), torch.ones(2)
    for b, t in ((0, 4), (2, 0)):
        dot = linear_grad_dot(torch.empty(b, t, 3), torch.empty(b, t, 2), direction, bias_direction, impl=impl)
        assert dot.tolist() == [0] * b


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_sample(impl: str) -> None:
    input = normal(3, 5, 4)
    input[1, 2, 3] = torch.nan
    dot = linear_grad_dot(input, normal(3, 5, 2, seed=1), normal(2, 4, seed=2), impl=impl)
    assert dot.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("direction", "bias_direction", "message"),
    [
        (torch.ones(2), None, r"expected direction \[O, I\], got \(2,\)"),
        (torch.ones(2, 4), None, "input and direction of equal I, got 3 and 4"),
        (torch.ones(3, 3), None, "grad_output and direction of equal O, got 2 and 3"),
        (torch.ones(2, 3), torch.ones(3), "grad_output and bias_direction of equal O, got 2 and 3"),
        (torch.ones(2, 3), torch.ones(2, 1), r"expected bias_direction \[O\], got \(2, 1\)"),
        (torch.ones(2, 3, device="meta"), None, "equal device, got cpu and cpu and meta"),
    ],
)
def test_bad_directions(direction: Tensor, bias_direction: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_grad_dot(torch.ones(5, 4, 3), torch.ones(5, 4, 2), direction, bias_direction)


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match=r"of equal B, T, got \(5, 4\) and \(5, 3\)"):
        linear_grad_dot(torch.ones(5, 4, 3), torch.ones(5, 3, 2), torch.ones(2, 3))


def test_is_a_proper_torch_op() -> None:
    op = torch.ops.diffprune.linear_grad_dot.default
    torch.library.opcheck(op, (normal(2, 3, 4), normal(2, 3, 5), normal(5, 4)))
    torch.library.opcheck(op, (normal(2, 3, 4).half(), normal(2, 3, 5), normal(5, 4), normal(5), "reference"))

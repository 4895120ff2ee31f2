"""``flow_matching_loss`` and its gradient against float64 arithmetic and autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.draws import draw_noise
from diffprune.flow import velocity_loss, velocity_target
from diffprune.kernels import flow_matching_loss, flow_matching_loss_grad

HASHES = torch.tensor([0, -1, 2**63 - 1, -(2**63), 123456789])
IMPLS = ["reference", "triton"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(velocity: Tensor, x1: Tensor, hashes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient of Σ weight·loss by autograd, in float64, at seed 7 and draw 3."""
    leaf = velocity.detach().double().requires_grad_()
    x0 = draw_noise(7, hashes, 3, x1.shape[1:]).double()
    loss = (leaf - (x1.detach().double() - x0)).square().flatten(1).mean(dim=1)
    (loss * weight.double()).sum().backward()
    return loss.detach(), leaf.grad


def check(velocity: Tensor, x1: Tensor, hashes: Tensor, impl: str, rtol: float = 2e-6) -> None:
    weight = normal(len(x1), seed=9)
    loss, grad = exact(velocity, x1, hashes, weight)
    if impl == "triton":
        found = launch(flow_matching_loss_grad, velocity, x1, hashes, 7, 3, weight)
        alone = launch(flow_matching_loss, velocity, x1, hashes, 7, 3)
    else:
        found = flow_matching_loss_grad(velocity, x1, hashes, 7, 3, weight, impl=impl)
        alone = flow_matching_loss(velocity, x1, hashes, 7, 3, impl=impl)
    assert torch.equal(found[0], alone)
    assert found[0].dtype == torch.float32 and found[1].dtype == velocity.dtype
    assert found[1].is_contiguous()
    torch.testing.assert_close(found[0].double(), loss, rtol=rtol, atol=0)
    scale = weight.abs().amax() / max(1, x1[:1].numel())
    torch.testing.assert_close(found[1].double(), grad, rtol=rtol, atol=rtol * float(scale))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3, 7), (2, 517), (3, 1367)])  # the last has 5 tiles of 1024
def test_odd_sizes(impl: str, shape: tuple[int, ...]) -> None:
    samples = 2 if len(shape) == 2 else 5
    check(normal(samples, *shape, seed=1), normal(samples, *shape, seed=2), HASHES[:samples], impl, 4e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_half_precision(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    velocity, x1 = normal(3, 45, seed=1).to(dtypes[0]), normal(3, 45, seed=2).to(dtypes[1])
    loss, grad = exact(velocity, x1, HASHES[:3], torch.ones(3))
    ones = torch.ones(3).bfloat16()
    if impl == "triton":
        found = launch(flow_matching_loss_grad, velocity, x1, HASHES[:3], 7, 3, ones)
    else:
        found = flow_matching_loss_grad(velocity, x1, HASHES[:3], 7, 3, ones, impl=impl)
    torch.testing.assert_close(found[0].double(), loss, rtol=2e-6, atol=0)
    assert found[1].dtype == dtypes[0]
    torch.testing.assert_close(found[1].double(), grad, rtol=torch.finfo(dtypes[0]).eps, atol=1e-7)


def test_reference_is_flow_of_draws() -> None:
    velocity, x1 = normal(4, 2, 3, 5, seed=1), normal(4, 2, 3, 5, seed=2)
    target = velocity_target(x1, draw_noise(7, HASHES[:4], 3, (2, 3, 5)))
    assert torch.equal(flow_matching_loss(velocity, x1, HASHES[:4], 7, 3), velocity_loss(velocity, target))


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd(impl: str) -> None:
    velocity = normal(3, 2, 5, seed=1).to(DEVICE).requires_grad_()
    x1, hashes = normal(3, 2, 5, seed=2).to(DEVICE).requires_grad_(), HASHES[:3].to(DEVICE)
    loss = flow_matching_loss(2 * velocity, x1, hashes, 7, 3, impl=impl)
    (loss * torch.tensor([1.0, -3.0, 0.5], device=DEVICE)).sum().backward()
    _, grad = exact(2 * velocity.cpu(), x1.cpu(), HASHES[:3], torch.tensor([1.0, -3.0, 0.5]))
    torch.testing.assert_close(velocity.grad.cpu().double(), 2 * grad, rtol=2e-6, atol=1e-7)
    assert x1.grad is None  # not differentiable with respect to the data, as the contract says
    velocity.grad = None
    flow_matching_loss(velocity, x1, hashes, 7, 3, impl=impl).mean().backward()  # an expanded gradient arrives
    _, grad = exact(velocity.cpu(), x1.cpu(), HASHES[:3], torch.full((3,), 1 / 3))
    torch.testing.assert_close(velocity.grad.cpu().double(), grad, rtol=2e-6, atol=1e-7)


def test_gradcheck() -> None:
    velocity, x1 = normal(3, 2, 5, seed=1).double().requires_grad_(), normal(3, 2, 5, seed=2).double()
    assert torch.autograd.gradcheck(lambda v: flow_matching_loss(v, x1, HASHES[:3], 7, 3), velocity)
    assert flow_matching_loss(velocity, x1, HASHES[:3], 7, 3).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_sample(impl: str) -> None:
    velocity, x1 = normal(3, 50, seed=1), normal(3, 50, seed=2)
    velocity[1, 49] = torch.nan
    args = velocity, x1, HASHES[:3], 0, 0, torch.tensor([1.0, 1.0, torch.nan])
    loss, grad = launch(flow_matching_loss_grad, *args) if impl == "triton" else flow_matching_loss_grad(*args)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[:2].isnan().nonzero().tolist() == [[1, 49]] and grad[2].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_no_samples(impl: str) -> None:
    check(normal(8, 3, seed=1).T, normal(25, seed=2)[1:].view(3, 8), HASHES[::2], impl)
    empty = torch.empty(0, 4), torch.empty(0, 4), HASHES[:0], 0, 0
    found = launch(flow_matching_loss, *empty) if impl == "triton" else flow_matching_loss(*empty)
    assert found.shape == (0,)


def test_fake_and_compiled() -> None:
    velocity, x1 = normal(3, 4, 5, seed=1), normal(3, 4, 5, seed=2)
    op, both = torch.ops.diffprune.flow_matching_loss.default, torch.ops.diffprune.flow_matching_loss_grad.default
    torch.library.opcheck(op, (velocity.clone().requires_grad_(), x1, HASHES[:3], 1, 2))
    torch.library.opcheck(op, (velocity.half().transpose(1, 2), x1.transpose(1, 2), HASHES[:3], 1, 2, "reference"))
    torch.library.opcheck(both, (velocity.bfloat16(), x1, HASHES[:3], 1, 2, torch.ones(3)))

    def step(weight: Tensor, draw: int) -> Tensor:
        return flow_matching_loss(weight * x1, x1, HASHES[:3], 1, draw).mean()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for draw in (0, 5):
        grads = []
        for function in (step, compiled):
            weight = torch.full((5,), 0.5, requires_grad=True)
            function(weight, draw).backward()
            grads.append(weight.grad)
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"velocity": torch.zeros(3, 2, 1)}, r"expected velocity and x1 of equal shape, got \(3, 2, 1\) and \(3, 2\)"),
        ({"velocity": torch.zeros(3, 2).int()}, "expected velocity of a floating dtype, got torch.int32"),
        ({"velocity": torch.zeros(3, 2, device="meta")}, "expected velocity and x1 of equal device, got meta and cpu"),
        ({"x1": torch.zeros(3, 2).int()}, r"expected x1 .* of a floating dtype, got \(3, 2\) torch.int32"),
        ({"x1": torch.zeros(3, 0), "velocity": torch.zeros(3, 0)}, "expected samples of at least one element"),
        ({"hashes": HASHES}, "expected x1 and hashes of equal B, got 3 and 5"),
        ({"seed": 2**32}, r"expected a seed in \[0, 2\*\*32\), got 4294967296"),
        ({"weight": torch.zeros(3, 1)}, r"expected weight \[B\], got \(3, 1\)"),
        ({"weight": torch.zeros(2)}, "expected velocity and weight of equal B, got 3 and 2"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    args = {"velocity": torch.zeros(3, 2), "x1": torch.zeros(3, 2), "hashes": HASHES[:3], "seed": 0, "draw": 0}
    args = args | {"weight": torch.zeros(3)} | change
    with pytest.raises(ValueError, match=message):
        flow_matching_loss_grad(**args)
    del args["weight"]
    if "weight" not in change:
        with pytest.raises(ValueError, match=message):
            flow_matching_loss(**args)

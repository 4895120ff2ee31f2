"""CUDA's ``flow_matching_loss`` against its definition: on a GPU, or its sources on the CPU."""

from __future__ import annotations

import pytest
import torch
from cuda_case import cuda_ops, launch  # noqa: F401
from torch import Tensor

from diffprune.kernels.flow_matching_loss import flow_matching_loss, flow_matching_loss_grad
from diffprune.kernels.philox import normal_noise

pytestmark = pytest.mark.usefixtures("cuda_ops")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HASHES = torch.tensor([0, -1, 2**63 - 1, -(2**63), 123456789, 42])


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("x1_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 3, 5), (6, 4, 16, 16), (2, 4097)])
def test_loss_and_gradient(shape: tuple[int, ...], dtype: torch.dtype, x1_dtype: torch.dtype) -> None:
    velocity, x1 = normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=x1_dtype)
    hashes, weight = HASHES[: shape[0]], normal(shape[0], seed=3)
    loss, grad = launch(flow_matching_loss_grad, velocity, x1, hashes, 7, 2**32 - 1, weight)
    wide = velocity.double(), x1.double(), hashes, 7, 2**32 - 1
    expected, expected_grad = flow_matching_loss_grad(*wide, weight.double(), impl="reference")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5 if shape == (1, 1) else 2e-6, atol=0)
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    unit = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2e-6}[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=unit, atol=1e-7)
    assert torch.equal(launch(flow_matching_loss, velocity, x1, hashes, 7, 2**32 - 1), loss)


def test_noise_is_the_definitions() -> None:
    """With v = 0 and x1 = 0 the gradient is 2/n·w·x0: all the noise, element by element."""
    samples, elements = len(HASHES), 10000
    zeros, weight = torch.zeros(samples, elements), torch.full((samples,), elements / 2)
    for seed, draw in [(0, 0), (2**32 - 1, 1)]:
        _, noise = launch(flow_matching_loss_grad, zeros, zeros, HASHES, seed, draw, weight)
        torch.testing.assert_close(noise, normal_noise(HASHES, seed, draw, elements), rtol=6e-7, atol=6e-7)


def test_autograd() -> None:
    velocity, x1 = normal(3, 2, 5, seed=1).requires_grad_(), normal(3, 2, 5, seed=2)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moved = velocity.to(device), x1.to(device), HASHES[:3].to(device)
    flow_matching_loss(*moved, 1, 2, impl="cuda").sum().backward()
    ours, velocity.grad = velocity.grad, None
    flow_matching_loss(velocity, x1, HASHES[:3], 1, 2, impl="reference").sum().backward()
    torch.testing.assert_close(ours, velocity.grad, rtol=2e-6, atol=1e-7)


def test_strides_alignment_and_no_samples() -> None:
    velocity, x1 = normal(8, 3, seed=1).T, normal(3, 8, seed=2)
    expected = flow_matching_loss(velocity.double(), x1.double(), HASHES[:3], 0, 0, impl="reference")
    for misaligned in (False, True):
        loss = launch(flow_matching_loss, velocity, x1, HASHES[:3], 0, 0, misaligned=misaligned)
        torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    assert launch(flow_matching_loss, velocity[:0], x1[:0], HASHES[:0], 0, 0).shape == (0,)


def test_nan_stays_in_its_sample() -> None:
    velocity, x1 = normal(3, 50, seed=1), normal(3, 50, seed=2)
    velocity[1, 49] = torch.nan
    loss = launch(flow_matching_loss, velocity, x1, HASHES[:3], 0, 0)
    assert loss.isnan().tolist() == [False, True, False]

"""CUDA's ``linear_grad_dot`` against float64: on a GPU, or its sources on the CPU."""

from __future__ import annotations

import emulator
import pytest
import torch
from cuda_case import GPU, cuda_ops, launch, path  # noqa: F401
from torch import Tensor

from diffprune.kernels import cuda, linear_grad_dot

pytestmark = pytest.mark.usefixtures("path")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(input: Tensor, grad_output: Tensor, direction: Tensor, bias: Tensor | None) -> Tensor:
    """Errors are relative to the largest value a dot of such vectors can have, over the root of their dimension."""
    dot = launch(linear_grad_dot, input, grad_output, direction, bias)
    assert dot.dtype == torch.float32
    a, g, m = input.double(), grad_output.double(), direction.double()
    gradient = torch.einsum("bto,bti->boi", g, a)
    expected = (gradient * m).sum(dim=(1, 2))
    if bias is not None:
        expected = expected + (g.sum(dim=1) * bias.double()).sum(dim=1)
    scale = gradient.flatten(1).norm(dim=1) * m.norm() / m.numel() ** 0.5
    error = (dot.double() - expected).abs() / (expected.abs() + scale)
    assert (error <= 3e-6).all(), error
    return dot


@pytest.mark.parametrize(
    ("b", "t", "i", "o", "dtype", "bias"),
    [
        (1, 1, 1, 1, torch.float16, True),
        (5, 3, 33, 17, torch.bfloat16, False),
        (3, 100, 72, 40, torch.bfloat16, True),  # more than one tile of rows, one of them not full
        (2, 257, 8, 24, torch.float16, False),  # three tiles of rows: one of the last cluster has none
        (2, 70, 200, 136, torch.float16, False),  # more steps than stages
        (2, 40, 264, 200, torch.bfloat16, True),  # two tiles of columns of 192 or 256, the second nearly empty
        (1, 50, 136, 520, torch.float16, False),  # wider output than input: the other side is the short one
        (2, 70, 260, 301, torch.bfloat16, False),  # likewise, two tiles of 192 columns
        (1, 40, 9, 203, torch.float16, False),  # the last step is nearly empty
        (1, 50, 72, 520, torch.float16, True),
    ],
)
def test_odd_sizes(b: int, t: int, i: int, o: int, dtype: torch.dtype, bias: bool) -> None:
    check(
        normal(b, t, i, seed=1, dtype=dtype),
        normal(b, t, o, seed=2, dtype=dtype),
        normal(o, i, seed=3, dtype=dtype),
        normal(o, seed=4, dtype=dtype) if bias else None,
    )


def test_bias_of_float32() -> None:
    """Not copied first; as long as the outputs are wide, which is no whole tile."""
    check(normal(3, 100, 72, seed=1), normal(3, 100, 40, seed=2), normal(40, 72, seed=3), normal(40, seed=4).float())


def test_many_tiles_per_block() -> None:
    """More tiles than the emulated device has multiprocessors: blocks go on with the ring where they left it."""
    check(normal(3, 260, 72, seed=1), normal(3, 260, 264, seed=2), normal(264, 72, seed=3), normal(264, seed=4))


@pytest.mark.skipif(GPU, reason="the order of threads is the GPU's own")
def test_any_order_of_threads_and_copies() -> None:
    tensors = normal(1, 300, 200, seed=1), normal(1, 300, 72, seed=2), normal(72, 200, seed=3), None
    expected = check(*tensors)
    if cuda.path == 90:  # sm_80's warps wait for each other too often for this to be quick
        emulator.seed(1, stragglers=True)
    for _ in range(2):
        assert torch.equal(check(*tensors), expected)


def test_strides_and_alignment() -> None:
    """Transposed inputs, every other element, views that begin at an odd element."""
    input, grad_output = normal(2, 40, 64, seed=1), normal(40, 2, 48, seed=2).transpose(0, 1)
    tensors = input, grad_output, normal(64, 48, seed=3).T, normal(96, seed=4)[::2]
    assert torch.equal(launch(linear_grad_dot, *tensors, misaligned=True), check(*tensors))


def test_sizes_without_elements() -> None:
    for b, t, i, o in [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0)]:
        bias = normal(o, seed=4)
        dot = launch(linear_grad_dot, normal(b, t, i, seed=1), normal(b, t, o, seed=2), normal(o, i, seed=3), bias)
        expected = (normal(b, t, o, seed=2).double().sum(dim=1) * bias.double()).sum(dim=1)
        torch.testing.assert_close(dot.double(), expected, rtol=1e-5, atol=1e-6)


def test_nan_stays_in_its_sample() -> None:
    input, grad_output, direction = normal(3, 90, 40, seed=1), normal(3, 90, 24, seed=2), normal(24, 40, seed=3)
    clean = check(input, grad_output, direction, None)
    input[1, 89, 3] = torch.nan
    dot = launch(linear_grad_dot, input, grad_output, direction, None)
    assert dot.isnan().tolist() == [False, True, False]
    assert torch.equal(dot[[0, 2]], clean[[0, 2]])


def test_repeats_to_the_bit() -> None:
    tensors = normal(2, 150, 72, seed=1), normal(2, 150, 48, seed=2), normal(48, 72, seed=3), normal(48, seed=4)
    first, second = (launch(linear_grad_dot, *tensors) for _ in range(2))
    assert torch.equal(first, second)


def test_refuses_what_it_cannot_do_exactly() -> None:
    half, single = normal(1, 2, 8, seed=1), normal(1, 2, 8, seed=1, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="cuda: needs float16 or bfloat16, got float32"):
        launch(linear_grad_dot, single, single, torch.ones(8, 8), None)
    with pytest.raises(NotImplementedError, match="cuda: needs inputs of one dtype, got float16 and bfloat16"):
        launch(linear_grad_dot, half, half.bfloat16(), torch.ones(8, 8).half(), None)

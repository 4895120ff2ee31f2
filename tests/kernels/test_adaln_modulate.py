"""``adaln_modulate`` and its gradients against PyTorch's LayerNorm and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import adaln_modulate
from diffprune.kernels.triton import Gpu, assume, tokens

IMPLS = ["reference", "cpu", "triton"]
OP, BACKWARD = torch.ops.diffprune.adaln_modulate, torch.ops.diffprune.adaln_modulate_backward


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(b: int, t: int, d: int) -> tuple[Tensor, ...]:
    return normal(b, t, d, seed=1), normal(b, d, seed=2), normal(b, d, seed=3), normal(b, t, d, seed=4)


def exact(x: Tensor, shift: Tensor, scale: Tensor, grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of x, shift and scale, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, shift, scale)]
    y = F.layer_norm(leaves[0], x.shape[2:], eps=1e-6) * (1 + leaves[2][:, None]) + leaves[1][:, None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]


def run(x: Tensor, shift: Tensor, scale: Tensor, grad_y: Tensor, impl: str) -> list[Tensor]:
    if impl == "triton":
        return [launch(adaln_modulate, x, shift, scale), *launch(BACKWARD, grad_y, x, scale)]
    return [adaln_modulate(x, shift, scale, impl=impl), *BACKWARD(grad_y, x, scale, impl)]


def check(x: Tensor, shift: Tensor, scale: Tensor, grad_y: Tensor, impl: str, atol: float = 3e-6) -> None:
    found, expected = run(x, shift, scale, grad_y, impl), exact(x, shift, scale, grad_y)
    for name, ours, theirs, like in zip(
        ("y", "grad_x", "grad_shift", "grad_scale"), found, expected, (shift, x, scale, scale), strict=True
    ):
        assert ours.dtype == like.dtype and ours.is_contiguous(), name
        unit = max(2e-6, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours.double(), theirs, rtol=unit, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 1), (2, 1, 37), (2, 5, 16), (1, 37, 20), (2, 9, 300), (1, 2, 1152)])
def test_odd_sizes(impl: str, b: int, t: int, d: int) -> None:
    # The gradient of one feature is 0 = (h - mean(h))/√1e-6. Where a GPU fuses h's product into that difference, what
    # was rounded off the mean is left: 2^-24 of h.
    check(*inputs(b, t, d), impl, atol=1e-5 if d > 1 else 3e-4)


def test_a_program_adds_up_several_tiles() -> None:
    """As where there are many samples for few multiprocessors; the last program has fewer tokens."""
    assert tokens.config(33, 300)[0]["ROWS"] == 4
    few, many = (Gpu(90, 227 * 1024, processors) for processors in (1, 1000))
    assert (tokens.share(2, 33, 4, few), tokens.share(2, 33, 4, many)) == (12, 4)
    with assume(few):
        check(*inputs(2, 33, 300), "triton", atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero(impl: str) -> None:
    """The variance is that of the differences from the mean: from squares, 1000² would leave no digits of it."""
    x, shift, scale, grad_y = inputs(2, 3, 45)
    check(x + 1000, shift, scale, grad_y, impl, atol=2e-3)
    check(x / 1000, shift, scale, grad_y / 1000, impl, atol=1e-5)  # the variance is no larger than what is added to it
    constant = torch.full((2, 3, 45), 0.7)
    y = run(constant, shift, scale, grad_y, impl)[0]
    torch.testing.assert_close(y, shift[:, None].expand_as(y), rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_half_precision(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    x, *others = inputs(2, 3, 20)
    check(x.to(dtypes[0]), *(tensor.to(dtypes[1]) for tensor in others), impl, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(2, 3, 5)[:3]]
    assert torch.autograd.gradcheck(lambda *args: adaln_modulate(*args, impl=impl), leaves)
    assert adaln_modulate(*leaves).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_of_chunks(impl: str) -> None:
    """Shift and scale as DiT has them: chunks of one modulation, and tokens with strides."""
    device = torch.device("cpu") if impl == "cpu" else DEVICE
    x, _, _, grad_y = (tensor.to(device) for tensor in inputs(2, 7, 12))
    modulation = normal(2, 36, seed=5).to(device).requires_grad_()
    tokens = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    shift, _, scale = modulation.chunk(3, dim=1)
    y = adaln_modulate(tokens, shift, scale, impl=impl)
    assert y.is_contiguous()
    y.backward(grad_y.transpose(1, 2).contiguous().transpose(1, 2))
    expected = exact(*(tensor.cpu() for tensor in (x, shift, scale, grad_y)))
    zeros = torch.zeros(2, 12, dtype=torch.float64)
    torch.testing.assert_close(y.detach().cpu().double(), expected[0], rtol=2e-6, atol=3e-6)
    torch.testing.assert_close(tokens.grad.cpu().double(), expected[1], rtol=2e-6, atol=1e-5)
    found = modulation.grad.cpu().double()
    torch.testing.assert_close(found, torch.cat([expected[2], zeros, expected[3]], dim=1), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_token(impl: str) -> None:
    x, shift, scale, grad_y = inputs(3, 6, 20)
    x[1, 4, 7] = torch.nan
    y, grad_x, grad_shift, grad_scale = run(x, shift, scale, grad_y, impl)
    for tensor in (y, grad_x):
        lost = torch.zeros(3, 6, 20, dtype=torch.bool)
        lost[1, 4] = True
        assert torch.equal(tensor.isnan(), lost)
    assert not grad_shift.isnan().any()
    assert grad_scale.isnan().all(dim=1).tolist() == [False, True, False]
    grad_y[2, 0, 3] = torch.nan
    _, grad_x, grad_shift, _ = run(x, shift, scale, grad_y, impl)
    assert grad_x[2, 0].isnan().all() and not grad_x[2, 1:].isnan().any()
    assert grad_shift.isnan().nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t"), [(0, 3), (2, 0)])
def test_empty(impl: str, b: int, t: int) -> None:
    y, grad_x, grad_shift, grad_scale = run(*inputs(b, t, 5), impl)
    assert y.shape == grad_x.shape == (b, t, 5)
    assert torch.equal(grad_shift, torch.zeros(b, 5)) and torch.equal(grad_scale, torch.zeros(b, 5))


def test_a_token_too_wide_for_triton() -> None:
    x, shift, scale, _ = (tensor.to(DEVICE) for tensor in inputs(1, 1, 20000))
    with pytest.raises(NotImplementedError, match="triton: needs at most 4096 features, got 20000"):
        adaln_modulate(x, shift, scale, impl="triton")


def test_fake_and_compiled() -> None:
    x, shift, scale, grad_y = inputs(2, 3, 4)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, shift, scale)]
    torch.library.opcheck(OP.default, tuple(leaves))
    half = x.transpose(1, 2).contiguous().transpose(1, 2), shift.half(), scale.half()
    for impl in ("reference", "cpu"):
        torch.library.opcheck(OP.default, (*half, impl), test_utils=("test_schema", "test_faketensor"))
        torch.library.opcheck(BACKWARD.default, (grad_y, x, scale, impl), test_utils=("test_schema", "test_faketensor"))
    torch.compile(adaln_modulate, backend="aot_eager", fullgraph=True)(*leaves).backward(grad_y)
    for leaf, expected in zip(leaves, exact(x, shift, scale, grad_y)[1:], strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, r"expected x \[B, T, D\], got \(2, 4\)"),
        ({"x": torch.zeros(2, 3, 4).int()}, "expected x of dtype float16 or .*, got torch.int32"),
        ({"shift": torch.zeros(2, 1, 4)}, r"expected shift \[B, D\], got \(2, 1, 4\)"),
        (
            {"scale": torch.zeros(2, 5)},
            r"expected x, shift and scale of equal B, D, got \(2, 4\) and \(2, 4\) and \(2, 5\)",
        ),
        ({"scale": torch.zeros(2, 4).half()}, "expected shift and scale of equal dtype"),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, "expected x, shift and scale of equal device, got meta"),
        ({"x": torch.zeros(2, 3, 0), "shift": torch.zeros(2, 0), "scale": torch.zeros(2, 0)}, "with D at least 1"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    args = {"x": torch.zeros(2, 3, 4), "shift": torch.zeros(2, 4), "scale": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        adaln_modulate(**(args | change))

"""``gated_residual`` and its gradients against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import gated_residual
from diffprune.kernels.triton import Gpu, assume

IMPLS = ["reference", "triton"]
OP, BACKWARD = torch.ops.diffprune.gated_residual, torch.ops.diffprune.gated_residual_backward


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(b: int, t: int, d: int) -> tuple[Tensor, ...]:
    return normal(b, t, d, seed=1), normal(b, t, d, seed=2), normal(b, d, seed=3), normal(b, t, d, seed=4)


def exact(residual: Tensor, branch: Tensor, gate: Tensor, grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of branch and gate, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (branch, gate)]
    y = residual.detach().double() + leaves[1][:, None] * leaves[0]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]


def run(residual: Tensor, branch: Tensor, gate: Tensor, grad_y: Tensor, impl: str) -> list[Tensor]:
    if impl == "triton":
        return [launch(gated_residual, residual, branch, gate), *launch(BACKWARD, grad_y, branch, gate)]
    return [gated_residual(residual, branch, gate, impl=impl), *BACKWARD(grad_y, branch, gate, impl)]


def check(residual: Tensor, branch: Tensor, gate: Tensor, grad_y: Tensor, impl: str) -> None:
    found, expected = run(residual, branch, gate, grad_y, impl), exact(residual, branch, gate, grad_y)
    for ours, theirs, like in zip(found, expected, (residual, branch, gate), strict=True):
        assert ours.dtype == like.dtype and ours.is_contiguous()
        unit = max(1e-6, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours.double(), theirs, rtol=unit, atol=3e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 1), (2, 1, 37), (2, 5, 16), (1, 37, 20), (2, 9, 300), (1, 2, 1152)])
def test_odd_sizes(impl: str, b: int, t: int, d: int) -> None:
    check(*inputs(b, t, d), impl)


def test_a_program_adds_up_several_tiles() -> None:
    """As where there are many samples for few multiprocessors; the last program has fewer tokens."""
    with assume(Gpu(90, 227 * 1024, 1)):
        check(*inputs(2, 33, 300), "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_half_precision(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    residual, branch, gate, grad_y = inputs(2, 3, 20)
    check(residual.to(dtypes[0]), branch.to(dtypes[1]), gate.to(dtypes[1]), grad_y.to(dtypes[0]), impl)


def test_gradcheck() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(2, 3, 5)[:3]]
    assert torch.autograd.gradcheck(gated_residual, leaves)
    assert gated_residual(*leaves).dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_autograd_of_chunks(impl: str) -> None:
    """The gate as DiT has it, a chunk of one modulation, and tokens with strides."""
    residual, branch, _, grad_y = (tensor.to(DEVICE) for tensor in inputs(2, 7, 12))
    modulation = normal(2, 36, seed=5).to(DEVICE).requires_grad_()
    residual.requires_grad_()
    tokens = branch.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    gate = modulation.chunk(3, dim=1)[2]
    y = gated_residual(residual, tokens, gate, impl=impl)
    assert y.is_contiguous()
    y.backward(grad_y.transpose(1, 2).contiguous().transpose(1, 2))
    expected = exact(*(tensor.cpu() for tensor in (residual, branch, gate, grad_y)))
    torch.testing.assert_close(y.detach().cpu().double(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(residual.grad, grad_y)
    torch.testing.assert_close(tokens.grad.cpu().double(), expected[1], rtol=1e-6, atol=1e-6)
    assert not modulation.grad[:, :24].any()
    torch.testing.assert_close(modulation.grad[:, 24:].cpu().double(), expected[2], rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_where_it_is(impl: str) -> None:
    residual, branch, gate, grad_y = inputs(3, 6, 20)
    residual[0, 1, 2], branch[1, 4, 7], gate[2, 9] = torch.nan, torch.nan, torch.nan
    y, grad_branch, grad_gate = run(residual, branch, gate, grad_y, impl)
    assert y.isnan().nonzero().tolist() == [[0, 1, 2], [1, 4, 7], *([2, token, 9] for token in range(6))]
    assert grad_branch.isnan().nonzero().tolist() == [[2, token, 9] for token in range(6)]
    assert grad_gate.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t", "d"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(impl: str, b: int, t: int, d: int) -> None:
    y, grad_branch, grad_gate = run(*inputs(b, t, d), impl)
    assert y.shape == grad_branch.shape == (b, t, d)
    assert torch.equal(grad_gate, torch.zeros(b, d))


def test_fake_and_compiled() -> None:
    residual, branch, gate, grad_y = inputs(2, 3, 4)
    leaves = [tensor.clone().requires_grad_() for tensor in (residual, branch, gate)]
    torch.library.opcheck(OP.default, tuple(leaves))
    strided = residual.transpose(1, 2).contiguous().transpose(1, 2)
    light = ("test_schema", "test_faketensor")
    torch.library.opcheck(OP.default, (strided, branch.half(), gate.half()), test_utils=light)
    torch.library.opcheck(BACKWARD.default, (strided, branch.half(), gate.half()), test_utils=light)
    torch.compile(gated_residual, backend="aot_eager", fullgraph=True)(*leaves).backward(grad_y)
    for leaf, expected in zip(leaves, [grad_y.double(), *exact(residual, branch, gate, grad_y)[1:]], strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 4)}, r"expected residual \[B, T, D\], got \(2, 4\)"),
        ({"branch": torch.zeros(2, 3, 4).int()}, "expected branch of dtype float16 or .*, got torch.int32"),
        (
            {"branch": torch.zeros(2, 1, 4)},
            r"expected residual and branch of equal shape, got \(2, 3, 4\) and \(2, 1, 4\)",
        ),
        ({"gate": torch.zeros(2, 1, 4)}, r"expected gate \[B, D\], got \(2, 1, 4\)"),
        ({"gate": torch.zeros(2, 5)}, r"expected branch and gate of equal B, D, got \(2, 4\) and \(2, 5\)"),
        ({"gate": torch.zeros(2, 4).half()}, "expected branch and gate of equal dtype"),
        ({"gate": torch.zeros(2, 4, device="meta")}, "expected residual, branch and gate of equal device, got cpu"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    args = {"residual": torch.zeros(2, 3, 4), "branch": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=message):
        gated_residual(**(args | change))

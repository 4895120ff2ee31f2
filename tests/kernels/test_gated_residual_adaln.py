"""``gated_residual_adaln`` and its gradients against PyTorch's LayerNorm and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import adaln_modulate, gated_residual, gated_residual_adaln
from diffprune.kernels.triton import Gpu, assume

IMPLS = ["reference", "triton"]
OP, BACKWARD = torch.ops.diffprune.gated_residual_adaln, torch.ops.diffprune.gated_residual_adaln_backward


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(b: int, t: int, d: int) -> list[Tensor]:
    """Residual, branch, gate, shift, scale and the gradients of x and y."""
    shapes = (b, t, d), (b, t, d), (b, d), (b, d), (b, d), (b, t, d), (b, t, d)
    return [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def exact(*args: Tensor) -> list[Tensor]:
    """x, y and the gradients of residual, branch, gate, shift and scale, in float64."""
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in args[:5]]
    residual, branch, gate, shift, scale = leaves
    x = residual + gate[:, None] * branch
    y = F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    grads = torch.autograd.grad([x, y], leaves, [grad.cpu().double() for grad in args[5:]])
    return [x.detach(), y.detach(), *grads]


def run(impl: str, *args: Tensor) -> list[Tensor]:
    residual, branch, gate, shift, scale, grad_x, grad_y = args
    if impl == "triton":
        x, y = launch(gated_residual_adaln, residual, branch, gate, shift, scale)
        return [x, y, *launch(BACKWARD, grad_x, grad_y, x, branch, gate, scale)]
    x, y = gated_residual_adaln(residual, branch, gate, shift, scale, impl=impl)
    return [x, y, *BACKWARD(grad_x, grad_y, x, branch, gate, scale, impl)]


def check(impl: str, *args: Tensor, atol: float = 1e-5) -> None:
    names = "x", "y", "grad_residual", "grad_branch", "grad_gate", "grad_shift", "grad_scale"
    for name, ours, theirs in zip(names, run(impl, *args), exact(*args), strict=True):
        assert ours.is_contiguous() and ours.dtype == torch.float32, name
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t", "d"), [(1, 1, 1), (2, 1, 37), (2, 5, 16), (1, 37, 20), (2, 9, 300), (1, 2, 1152)])
def test_odd_sizes(impl: str, b: int, t: int, d: int) -> None:
    # Of one feature's gradient, (h - mean(h))/√1e-6, a GPU may leave the mean's rounding: see test_adaln_modulate.py.
    check(impl, *inputs(b, t, d), atol=1e-5 if d > 1 else 3e-4)


def test_a_program_adds_up_several_tiles() -> None:
    with assume(Gpu(90, 227 * 1024, 1)):
        check("triton", *inputs(2, 33, 300))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_half_precision_is_the_two_ops(impl: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """To the bit in the forward: y is of the rounded x."""
    residual, branch, gate, shift, scale, grad_x, grad_y = inputs(2, 3, 20)
    args = residual.to(dtypes[0]), *(tensor.to(dtypes[1]) for tensor in (branch, gate, shift, scale))
    grads = grad_x.to(dtypes[0]), grad_y.to(dtypes[1])
    found = run(impl, *args, *grads)
    x = gated_residual(*args[:3], impl="reference")
    y = adaln_modulate(x, *args[3:], impl="reference")
    assert found[1].dtype == dtypes[1]
    assert torch.equal(found[0], x)
    torch.testing.assert_close(found[1], y, rtol=torch.finfo(dtypes[1]).eps, atol=1e-6)
    for ours, theirs in zip(found[2:], exact(*args, *grads)[2:], strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < torch.finfo(dtypes[1]).eps, error


def test_gradcheck() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(2, 2, 4)[:5]]
    assert torch.autograd.gradcheck(gated_residual_adaln, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_autograd_of_chunks(impl: str, used: tuple[int, ...]) -> None:
    """Chunks of one modulation; also where the last block needs only y, or nothing takes y's gradient."""
    residual, branch, _, _, _, grad_x, grad_y = (tensor.to(DEVICE) for tensor in inputs(2, 7, 12))
    modulation = normal(2, 36, seed=9).to(DEVICE).requires_grad_()
    leaves = [residual.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), branch.requires_grad_()]
    chunks = modulation.chunk(3, dim=1)
    outputs = gated_residual_adaln(*leaves, *chunks, impl=impl)
    grads = [grad_x, grad_y]
    torch.autograd.backward([outputs[i] for i in used], [grads[i] for i in used])
    expected = exact(*leaves, *chunks, *(grads[i] if i in used else torch.zeros_like(grads[i]) for i in (0, 1)))
    found = leaves[0].grad, leaves[1].grad, *modulation.grad.chunk(3, dim=1)
    for ours, theirs in zip(found, expected[2:], strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_token(impl: str) -> None:
    args = inputs(2, 4, 20)
    args[1][1, 2, 7] = torch.nan
    x, y, grad_residual, grad_branch, grad_gate, grad_shift, grad_scale = run(impl, *args)
    lost = torch.zeros(2, 4, 20, dtype=torch.bool)
    lost[1, 2] = True
    assert x.isnan().nonzero().tolist() == [[1, 2, 7]]
    assert all(torch.equal(tensor.isnan(), lost) for tensor in (y, grad_residual, grad_branch))
    assert all(tensor.isnan().all(dim=1).tolist() == [False, True] for tensor in (grad_gate, grad_scale))
    assert not grad_shift.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("b", "t"), [(0, 3), (2, 0)])
def test_empty(impl: str, b: int, t: int) -> None:
    *tokens, grad_gate, grad_shift, grad_scale = run(impl, *inputs(b, t, 5))
    assert all(tensor.shape == (b, t, 5) for tensor in tokens)
    assert all(torch.equal(tensor, torch.zeros(b, 5)) for tensor in (grad_gate, grad_shift, grad_scale))


def test_fake_and_compiled() -> None:
    args = inputs(2, 3, 4)
    leaves = [tensor.clone().requires_grad_() for tensor in args[:5]]
    torch.library.opcheck(OP.default, tuple(leaves))
    light = ("test_schema", "test_faketensor")
    strided = args[0].transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(OP.default, (strided, *(tensor.half() for tensor in args[1:5])), test_utils=light)
    backward = args[5], args[6].half(), strided, args[1].half(), args[2].half(), args[4].half()
    torch.library.opcheck(BACKWARD.default, backward, test_utils=light)
    outputs = torch.compile(gated_residual_adaln, backend="aot_eager", fullgraph=True)(*leaves)
    torch.autograd.backward(outputs, args[5:])
    for leaf, expected in zip(leaves, exact(*args)[2:], strict=True):
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-6, atol=1e-5)


ROWS = "expected branch, gate, shift and scale of equal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": torch.zeros(2, 4)}, r"expected residual \[B, T, D\], got \(2, 4\)"),
        ({"branch": torch.zeros(2, 1, 4)}, "expected residual and branch of equal shape"),
        ({"gate": torch.zeros(2, 4).int()}, "expected gate of dtype float16 or .*, got torch.int32"),
        ({"shift": torch.zeros(2, 1, 4)}, r"expected shift \[B, D\], got \(2, 1, 4\)"),
        ({"scale": torch.zeros(2, 5)}, rf"{ROWS} B, D, got .* and \(2, 5\)"),
        ({"shift": torch.zeros(2, 4).half()}, f"{ROWS} dtype"),
        (
            {"scale": torch.zeros(2, 4, device="meta")},
            "expected residual, branch, gate, shift and scale of equal device",
        ),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    args = {name: torch.zeros(2, 3, 4) for name in ("residual", "branch")}
    args |= {name: torch.zeros(2, 4) for name in ("gate", "shift", "scale")}
    with pytest.raises(ValueError, match=message):
        gated_residual_adaln(**(args | change))


def test_no_features() -> None:
    with pytest.raises(ValueError, match="with D at least 1, got"):
        gated_residual_adaln(*[torch.zeros(2, 3, 0)] * 2, *[torch.zeros(2, 0)] * 3)

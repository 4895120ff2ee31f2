"""``linear_grad_sqnorm_dot`` against autograd in float64, one sample at a time."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import pytest
import torch
from cuda_case import cuda_ops  # noqa: F401
from torch import Tensor
from triton_bounds import launch, within_bounds
from triton_case import DEVICE

from diffprune.kernels import linear_grad_dot, linear_grad_sqnorm, linear_grad_sqnorm_dot

IMPLS = ["reference", "cpu", "triton"]
HALF = torch.float16


@pytest.fixture(params=[True, False], ids=["one pass", "two passes"])
def once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Each way in turn, whatever the sizes."""
    for name, choice in (("cpu", "pays"), ("triton", "at_once")):
        monkeypatch.setattr(module(name), choice, lambda *_: request.param)
    return request.param


def module(name: str) -> ModuleType:
    return import_module(f"diffprune.kernels.{name}.linear_grad_sqnorm_dot")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(b: int, t: int, i: int, o: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, gradient, direction and the bias's."""
    return normal(b, t, i, seed=1), normal(b, t, o, seed=2), normal(o, i, seed=3), normal(o, seed=4)


def autograd(a: Tensor, g: Tensor, direction: Tensor, bias_direction: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """[B] float64 of a real linear layer, sample by sample: ‖∇‖², ⟨∇, M⟩, and the largest that this can be."""
    parameters = [m.double().clone().requires_grad_() for m in (direction, bias_direction) if m is not None]
    along = torch.cat([m.detach().flatten() for m in parameters])
    gradients = torch.empty(len(a), len(along), dtype=torch.float64)
    for row, x, y in zip(gradients, a.double(), g.double(), strict=True):
        parts = torch.autograd.grad((torch.nn.functional.linear(x, *parameters) * y).sum(), parameters)
        row.copy_(torch.cat([part.flatten() for part in parts]))
    return gradients.square().sum(dim=1), gradients @ along, gradients.norm(dim=1) * along.norm()


def check(a: Tensor, g: Tensor, direction: Tensor, bias_direction: Tensor | None, impl: str, tol: float = 1e-5) -> None:
    run = launch if impl in ("triton", "cuda") else lambda op, *args, impl: op(*args, impl=impl)
    sqnorm, dot = run(linear_grad_sqnorm_dot, a, g, direction, bias_direction, impl=impl)
    dtype = torch.float64 if torch.float64 in (a.dtype, g.dtype, direction.dtype) else torch.float32
    assert sqnorm.dtype == dot.dtype == dtype
    expected, along, largest = autograd(a, g, direction, bias_direction)
    torch.testing.assert_close(sqnorm.double(), expected, rtol=tol, atol=0)
    size = along.abs() + largest / max(1, direction.numel()) ** 0.5
    assert ((dot.double() - along).abs() <= tol * size).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (5, 1, 33, 17), (3, 7, 64, 96), (4, 70, 5, 3), (2, 66, 70, 90)])
def test_odd_sizes(impl: str, bias: bool, size: tuple[int, int, int, int], once: bool) -> None:
    a, g, m, bias_direction = layer(*size)
    check(a, g, m, bias_direction if bias else None, impl)


@pytest.mark.parametrize("size", [(2, 192, 72, 264), (2, 140, 71, 263), (3, 20, 264, 8)])
def test_triton_tiles(size: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles each way, several steps, by descriptors and by pointers; directions in both precisions."""
    monkeypatch.setattr(module("triton"), "at_once", lambda *_: True)
    a, g, m, bias_direction = layer(*size)
    check(a.half(), g.half(), m.half(), bias_direction.half(), "triton")
    check(a.half(), g.half(), m, bias_direction, "triton")


@pytest.mark.usefixtures("once")
def test_triton_reads_nothing_else() -> None:
    a, g, m, bias_direction = layer(2, 21, 33, 70)
    with within_bounds():
        args = (x.to(DEVICE) for x in (a, g, m, bias_direction))
        sqnorm, _ = linear_grad_sqnorm_dot(*args, impl="triton")
    assert sqnorm.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl: str, once: bool) -> None:
    a, g = normal(3, 40, 9).mT, normal(3, 9, 44, seed=1)[:, :, ::2]
    check(a, g, normal(40, 22, seed=2).mT, normal(22, 3, seed=3)[:, 1], impl)
    check(a, g[:, :, :10], normal(20, 40, seed=2)[::2], normal(10, seed=3), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_precision_is_upcast(impl: str, once: bool) -> None:
    a, g, m, bias_direction = layer(3, 40, 12, 30)
    check(a.half(), g.half(), m, bias_direction, impl)
    check(a.half(), g, m.bfloat16(), bias_direction, impl)
    if impl != "triton":
        check(a.double(), g, m, bias_direction, impl, tol=1e-12)
        check(a, g.bfloat16(), m.double(), bias_direction, "reference", tol=1e-12)


def test_float64_direction_alone() -> None:
    """The norm is as exact as the dot, in whatever way the two are found."""
    a, g, m, bias_direction = layer(3, 40, 12, 30)
    for part in (slice(None), slice(5)):
        sqnorm, dot = linear_grad_sqnorm_dot(a[:, part], g[:, part], m.double(), bias_direction, impl="cpu")
        assert sqnorm.dtype == dot.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0), (2, 4, 0, 3)])
def test_empty(impl: str, size: tuple[int, int, int, int], once: bool) -> None:
    check(*layer(*size), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("t", [1, 60])
def test_nan_stays_in_its_sample(impl: str, t: int, once: bool) -> None:
    a, g, m, bias_direction = (x.to(DEVICE) for x in layer(3, t, 20, 30))
    a[1, -1, 3] = torch.nan
    for found in linear_grad_sqnorm_dot(a, g, m, bias_direction, impl=impl):
        assert found.isnan().tolist() == [False, True, False]


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the outputs, and of the samples."""
    own = module("cpu")
    monkeypatch.setattr(own, "pays", lambda *_: True)
    for block in (1, 500, 50 * 70, 3 * 50 * 70):
        monkeypatch.setattr(own, "BLOCK", block)
        check(*layer(7, 12, 50, 70), "cpu")


def test_one_pass_pays_where_operations_are_fewer() -> None:
    """DiT-XL/2's blocks, first and last layer, and adaLN's single token."""

    def at_once(tokens: int, wide: int, high: int, *dtypes: torch.dtype) -> bool:
        shapes = (9, tokens, wide), (9, tokens, high), (high, wide)
        tensors = [torch.empty(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        return module("triton").at_once(*tensors)

    half, brain, full = torch.float16, torch.bfloat16, torch.float32
    for dtype in (half, brain):
        assert not at_once(256, 1152, 3456, dtype, dtype, dtype) and not at_once(256, 1152, 1152, dtype, dtype, dtype)
        assert at_once(1024, 1152, 4608, dtype, dtype, dtype)
        assert at_once(256, 16, 1152, dtype, dtype, dtype) and at_once(256, 1152, 32, dtype, dtype, dtype)
        assert at_once(256, 1152, 3456, dtype, dtype, full)
        assert not at_once(1, 1152, 6912, dtype, dtype, full)
    assert at_once(256, 1152, 1152, full, full, full)
    assert not at_once(0, 5, 5, full, full, full)
    pays = module("cpu").pays
    assert pays(256, 1152, 3456) and pays(256, 16, 1152)
    assert not pays(64, 384, 384) and not pays(1, 384, 384)


@pytest.mark.parametrize("t", [3, 400])
def test_says_what_the_other_two_say(t: int) -> None:
    a, g, m, bias_direction = layer(2, t, 24, 20)
    sqnorm, dot = linear_grad_sqnorm_dot(a, g, m, bias_direction)
    torch.testing.assert_close(sqnorm, linear_grad_sqnorm(a, g, True), rtol=1e-5, atol=0)
    torch.testing.assert_close(dot, linear_grad_dot(a, g, m, bias_direction), rtol=1e-4, atol=1e-3)


@pytest.mark.usefixtures("cuda_ops")
@pytest.mark.parametrize("t", [1, 9])
def test_cuda(t: int) -> None:
    a, g, m, bias_direction = layer(3, t, 24, 40)
    check(a.half(), g.half(), m.half(), bias_direction, "cuda")


def test_same_bits_each_time(once: bool) -> None:
    a, g, m, _ = (x.half() for x in layer(3, 70, 40, 50))
    found = [launch(linear_grad_sqnorm_dot, a, g, m) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_bad_input() -> None:
    a, g, m, bias_direction = layer(5, 4, 3, 2)
    for args, message in (
        ((a[0], g, m), r"expected input \[B, T, I\], got \(4, 3\)"),
        ((a, g[:, :3], m), r"of equal B, T, got \(5, 4\) and \(5, 3\)"),
        ((a, g, m.mT), "input and direction of equal I, got 3 and 2"),
        ((a, g, m, bias_direction[:1]), "grad_output and bias_direction of equal O, got 2 and 1"),
        ((a, g, m.to("meta")), "equal device, got cpu and cpu and meta"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_grad_sqnorm_dot(*args)


def test_is_a_proper_torch_op() -> None:
    op = torch.ops.diffprune.linear_grad_sqnorm_dot.default
    a, g, m, bias_direction = layer(2, 40, 4, 5)
    torch.library.opcheck(op, (a, g, m))
    torch.library.opcheck(op, (a[:, :3].half(), g[:, :3], m, bias_direction, "reference"))
    compiled = torch.compile(lambda *x: linear_grad_sqnorm_dot(*x), backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(a, g, m), linear_grad_sqnorm_dot(a, g, m), strict=True):
        assert torch.equal(found, expected)


def test_keeps_no_graph() -> None:
    a, g, m, _ = layer(2, 3, 4, 5)
    assert not any(x.requires_grad for x in linear_grad_sqnorm_dot(a.requires_grad_(), g, m))

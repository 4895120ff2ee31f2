"""``attention`` and its gradients against softmax and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_bounds import launch
from triton_case import DEVICE

from diffprune.kernels import attention, report
from diffprune.kernels.triton.attention import strides, widths

IMPLS = ["reference", "triton"]
OP, BACKWARD = torch.ops.diffprune.attention, torch.ops.diffprune.attention_backward


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(b: int, h: int, t: int, d: int) -> list[Tensor]:
    """Query, key, value and the gradient of the output."""
    return [normal(b, h, t, d, seed=seed) for seed in range(4)]


def exact(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> list[Tensor]:
    """Output, logsumexp, and the gradients of query, key and value, in float64."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    scores = torch.einsum("bhqd,bhkd->bhqk", leaves[0], leaves[1]) / query.shape[3] ** 0.5
    out = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(dim=3), leaves[2])
    grads = torch.autograd.grad(out, leaves, grad_out.double())
    return [out.detach(), scores.detach().logsumexp(dim=3), *grads]


def run(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, impl: str) -> list[Tensor]:
    if impl == "triton":
        out, logsumexp = launch(OP, query, key, value)
        return [out, logsumexp, *launch(BACKWARD, grad_out, query, key, value, out, logsumexp)]
    out, logsumexp = OP(query, key, value, impl)
    return [out, logsumexp, *BACKWARD(grad_out, query, key, value, out, logsumexp, impl)]


def check(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, impl: str, tol: float = 3e-6) -> None:
    found, expected = run(query, key, value, grad_out, impl), exact(query, key, value, grad_out)
    names = "out", "logsumexp", "grad_query", "grad_key", "grad_value"
    for name, ours, theirs in zip(names, found, expected, strict=True):
        error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1)
        assert error <= (3e-6 if name == "logsumexp" else tol), (name, error)
        assert ours.dtype == (torch.float32 if name == "logsumexp" else query.dtype)
        if name != "logsumexp":
            assert ours.transpose(1, 2).is_contiguous(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("b", "h", "t", "d"),
    [
        (1, 1, 1, 1),
        (2, 1, 1, 64),
        (1, 2, 5, 8),
        (1, 1, 33, 16),
        (1, 1, 70, 32),
        (1, 1, 20, 64),
        (1, 2, 33, 72),
        (1, 1, 17, 96),
        (1, 1, 33, 128),
        (1, 1, 9, 27),
    ],
)
def test_odd_sizes(impl: str, b: int, h: int, t: int, d: int) -> None:
    check(*inputs(b, h, t, d), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("t", "d"), [(70, 72), (130, 16)])  # past a tile of 64, past one of 128
def test_float16(impl: str, t: int, d: int) -> None:
    check(*(tensor.half() for tensor in inputs(1, 1, t, d)), impl, tol=2e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="products of bfloat16 are wrong in Triton's interpreter")
@pytest.mark.parametrize("d", [32, 64, 72, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_head_sizes_on_a_gpu(dtype: torch.dtype, d: int) -> None:
    for t in (256, 200, 64, 1000):
        check(*(tensor.to(dtype) for tensor in inputs(2, 3, t, d)), "triton", tol=1e-2)


def test_half_precision_of_the_definition() -> None:
    check(*(tensor.bfloat16() for tensor in inputs(2, 1, 7, 5)), "reference", tol=1e-2)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores(impl: str) -> None:
    """Exponentials of scores beyond ±88 leave float32.

    Queries and keys are on a grid on which float32 sums their products exactly, in any order. Else the answer hangs on
    the order in which this processor's BLAS adds: the output is made of the forward's weights, and where the keys have
    a part in common the query's gradient is that part times the difference to the backward's, 4e-5 for scores of -196.
    """
    query, key, value, grad_out = inputs(1, 1, 40, 18)
    # What is left is the rounding of scores up to ±2000·log2(e), half of 2^-12: a relative error of a weight of 8e-5.
    # And a GPU's exponentials are off by 2^-22, of which keys as long as 80 make as much again.
    check(grid(query * 20), grid(key * 20), value, grad_out, impl, tol=2e-4)
    # All scores near -208: where a key is missing beyond the last, a score of 0 would be e^208 times theirs.
    check(grid(0.1 * query + 7), grid(0.1 * key - 7), value, grad_out, impl, tol=2e-5)


def grid(x: Tensor) -> Tensor:
    """Multiples of 1/16: below 2^7, two of them have a product of 22 bits at most."""
    return (x * 16).round() / 16


@pytest.mark.parametrize("impl", [*IMPLS, "auto", "sdpa"])
def test_autograd_of_a_projection(impl: str) -> None:
    """Query, key and value as DiT has them: parts of one tensor."""
    packed = normal(2, 7, 3, 2, 24).to(DEVICE).requires_grad_()
    grad_out = normal(2, 2, 7, 24, seed=1)
    parts = packed.permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(*parts, impl=impl)
    out.backward(grad_out.to(DEVICE))
    expected = exact(*(part.detach().cpu() for part in parts), grad_out)
    torch.testing.assert_close(out.detach().cpu().double(), expected[0], rtol=2e-6, atol=2e-6)
    gradient = torch.stack(expected[2:]).permute(1, 3, 0, 2, 4)
    torch.testing.assert_close(packed.grad.cpu().double(), gradient, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl: str) -> None:
    query, key, value, grad_out = inputs(2, 2, 5, 9)
    last = key.transpose(2, 3).contiguous().transpose(2, 3)
    check(query[:, :, ::2], last[:, :, ::2], value[:, :, 2:], grad_out[:, :, ::2], impl)


def test_gradcheck() -> None:
    leaves = [tensor.double().requires_grad_() for tensor in inputs(1, 2, 3, 2)[:3]]
    assert torch.autograd.gradcheck(lambda *args: attention(*args, impl="reference"), leaves)
    assert torch.autograd.gradcheck(attention, leaves)


def test_auto_is_pytorchs_until_ours_is_measured() -> None:
    query, key, value, _ = inputs(2, 3, 9, 16)
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))
    assert next(iter(report()["attention"].items())) == ("sdpa", None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan(impl: str, place: int) -> None:
    """In a query it stays in the row, in a key it reaches the head, in a value the head's column."""
    args = inputs(1, 2, 9, 18)
    args[place][0, 1, 8, 17] = torch.nan
    out, _, *gradients = run(*args, impl)
    lost = torch.zeros(9, 18, dtype=torch.bool)
    lost[(slice(8, 9), slice(None), (slice(None), 17))[place]] = True
    assert not out[0, 0].isnan().any() and torch.equal(out[0, 1].isnan(), lost)
    for gradient, theirs in zip(gradients, exact(*args)[2:], strict=True):
        assert torch.equal(gradient.isnan(), theirs.isnan())


@pytest.mark.parametrize("t", [1, 5, 20])
def test_nan_query_with_few_keys(t: int) -> None:
    """PyTorch's own CPU kernel answers 0 below 8 or 16 keys."""
    args = inputs(1, 2, t, 6)
    args[0][0, 1, t - 1, 3] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in args[:3]]
    out = attention(*leaves)
    out.backward(args[3])
    for found, expected in zip((out, *(leaf.grad for leaf in leaves)), exact_and_grads(*args), strict=True):
        torch.testing.assert_close(found.detach().double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def exact_and_grads(*args: Tensor) -> list[Tensor]:
    out, _, *grads = exact(*args)
    return [out, *grads]


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_empty(impl: str, shape: tuple[int, ...]) -> None:
    if impl == "auto":
        assert attention(*inputs(*shape)[:3]).shape == shape
    else:
        assert [tuple(tensor.shape) for tensor in run(*inputs(*shape), impl)] == [shape, shape[:3], *[shape] * 3]


def test_what_triton_refuses() -> None:
    query = torch.zeros(1, 1, 2, 136, device=DEVICE)
    with pytest.raises(NotImplementedError, match="triton: needs heads of size at most 128, got 136"):
        attention(query, query, query, impl="triton")
    with pytest.raises(NotImplementedError, match="triton: needs float16 or bfloat16 or float32, got float64"):
        attention(*[query[..., :8].double()] * 3, impl="triton")


def test_tiles_and_units() -> None:
    """72 is 64 and 16, of which 8 are masked; nothing is padded in memory."""
    found = {size: tuple(widths(size).values())[1:] for size in (1, 16, 24, 32, 64, 72, 80, 96, 127, 128)}
    assert found == {
        1: (16, 0), 16: (16, 0), 24: (16, 16), 32: (32, 0), 64: (64, 0),
        72: (64, 16), 80: (64, 16), 96: (64, 32), 127: (64, 64), 128: (128, 0),
    }  # fmt: skip
    packed = torch.empty(2, 5, 3, 6, 72, dtype=torch.float16).permute(2, 0, 3, 1, 4)
    assert strides(packed[0], packed[1]) == ([5 * 3 * 6 * 9, 9, 3 * 6 * 9] * 2, 8)
    assert strides(torch.empty(1, 2, 3, 5)) == ([30, 15, 5], 1)


def test_fake_and_compiled() -> None:
    query, key, value, grad_out = inputs(1, 2, 3, 4)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(OP.default, (*leaves, "reference"))
    out, logsumexp = OP(query.half(), key.half(), value.half(), "reference")
    args = grad_out.half(), query.half(), key.half(), value.half(), out, logsumexp, "reference"
    torch.library.opcheck(BACKWARD.default, args, test_utils=("test_schema", "test_faketensor"))
    expected = exact(query, key, value, grad_out)[2:]
    for impl in ("auto", "reference"):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        compiled(*leaves, impl=impl).backward(grad_out)
        for leaf, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad.double(), gradient, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 4)}, r"expected query \[B, H, T, d\], got \(2, 3, 4\)"),
        ({"key": torch.zeros(1, 2, 3, 4).int()}, "expected key of dtype float16 or .*, got torch.int32"),
        ({"key": torch.zeros(1, 2, 5, 4)}, "expected query, key and value of equal shape, got .*5, 4"),
        ({"value": torch.zeros(1, 2, 3, 4).half()}, "expected query, key and value of equal dtype"),
        ({"value": torch.zeros(1, 2, 3, 4, device="meta")}, "expected query, key and value of equal device"),
        ({name: torch.zeros(1, 2, 3, 0) for name in ("query", "key", "value")}, "heads of size at least 1"),
        ({"impl": "flash"}, "attention: expected impl to be one of auto, sdpa, cuda, triton, .*got 'flash'"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    args = {name: torch.zeros(1, 2, 3, 4) for name in ("query", "key", "value")}
    with pytest.raises(ValueError, match=message):
        attention(**(args | change))

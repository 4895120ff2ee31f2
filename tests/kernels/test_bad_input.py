"""Every tensor of every public op: what is wrong with it is said, and what is only unusual gives the same answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import OPS, PAIRS, SIZES, TENSORS, arguments, run
from torch import Tensor

from diffprune.kernels import (
    attention,
    flow_interpolate,
    flow_matching_loss,
    kmeans_assign,
    kmeans_update,
    knn_radius,
    linear_grad_sqnorm,
    pairwise_topk,
)

FINITE = (("kmeans_assign", "centroids"), ("knn_radius", "points"), ("pairwise_topk", "points"))
"""Where a NaN leaves no answer."""

NO_EMPTY = {
    "adaln_modulate": "D",
    "attention": "D",
    "flow_matching_loss": "CD",
    "flow_matching_loss_grad": "CD",
    "gated_residual_adaln": "D",
    "kmeans_assign": "KD",
    "kmeans_update_delta": "K",
    "knn_radius": "ND",
    "pairwise_topk": "ND",
}
"""Dimensions that cannot be 0."""


def dimensions(op: str) -> set[str]:
    return set(" ".join(TENSORS[op].values()).split())


def grown(x: Tensor, axis: int) -> Tensor:
    """One more along this axis."""
    return torch.cat([x, x.narrow(axis, 0, 1)], dim=axis)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_rank(op: str, name: str) -> None:
    given = arguments(op)
    x = given[name]
    for other in (
        (x[0] if x.dim() > 1 else x[0].clone(), x[None]) if "B C D" not in TENSORS[op][name] else (x[0, 0, 0],)
    ):
        with pytest.raises(ValueError, match=r"^expected .*, got "):
            run(op, given | {name: other})


@pytest.mark.parametrize(("op", "name"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.bool, torch.complex64, torch.uint8, torch.float8_e5m2])
def test_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    given = arguments(op)
    with pytest.raises(ValueError, match=f"^expected .*{name}.*, got .*{dtype}"):
        run(op, given | {name: torch.zeros(given[name].shape, dtype=dtype)})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_integers_and_floats_are_not_mixed_up(op: str, name: str) -> None:
    given = arguments(op)
    other = given[name].int() if given[name].is_floating_point() else given[name].float()
    with pytest.raises(ValueError, match=f"^expected .*{name}.*, got .*{other.dtype}"):
        run(op, given | {name: other})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_shape(op: str, name: str) -> None:
    """Each length that another tensor has too."""
    given, shape = arguments(op), TENSORS[op][name].split()
    for axis, dimension in enumerate(shape):
        shared = [other for other, own in TENSORS[op].items() if other != name and dimension in own.split()]
        if shared:
            with pytest.raises(ValueError, match=r"^expected .*, got .*\d"):
                run(op, given | {name: grown(given[name], axis)})


@pytest.mark.parametrize(("op", "name"), [pair for pair in PAIRS if len(TENSORS[pair[0]]) > 1])
def test_device(op: str, name: str) -> None:
    given = arguments(op)
    with pytest.raises(ValueError, match=r"^expected .*equal device, got .*meta"):
        run(op, given | {name: given[name].to("meta")})


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors_give_meta_tensors(op: str) -> None:
    given = arguments(op)
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    for found, expected in zip(run(op, meta), run(op, given), strict=True):
        assert found.device.type == "meta"
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_layout(op: str, name: str) -> None:
    given = arguments(op)
    with pytest.raises(ValueError, match=f"^expected {name} as a dense tensor, got torch.sparse_coo"):
        run(op, given | {name: given[name].to_sparse()})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_what_is_no_array(op: str, name: str) -> None:
    given = arguments(op)
    for value in ("text", 3, [1.0, 2.0], object()):
        with pytest.raises(ValueError, match=f"^expected {name} as a torch, NumPy or CuPy array, got "):
            run(op, given | {name: value})


@pytest.mark.parametrize(("op", "name"), PAIRS)
def test_memory(op: str, name: str) -> None:
    """However the tensor lies in memory, with gaps, turned around, at an odd address, all rows one row, or negated."""
    given = arguments(op)
    x = given[name]
    gaps = torch.full((*x.shape, 2), 7, dtype=x.dtype)
    gaps[..., 0] = x
    turned = x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    forms = [gaps[..., 0], turned, shifted]
    if x.dtype == torch.float32:
        forms.append(torch.complex(torch.zeros_like(x), -x).conj().imag)
        assert forms[-1].is_neg()
    for form in forms:
        assert torch.equal(form, x)
        for found, expected in zip(run(op, given | {name: form}), run(op, given), strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    expanded = x[:1].expand(x.shape)
    for found, expected in zip(
        run(op, given | {name: expanded}), run(op, given | {name: expanded.contiguous()}), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("op", "dimension"), [(op, d) for op in OPS for d in sorted(dimensions(op))])
def test_empty(op: str, dimension: str) -> None:
    given = arguments(op, **{dimension: 0})
    if dimension == "K":
        given = {name: x[:0] if "assignment" in name or name == "points" else x for name, x in given.items()}
    if dimension in NO_EMPTY.get(op, ""):
        with pytest.raises(ValueError, match=r"^expected .*(at least 1|at least one|from 1 to).*, got "):
            run(op, given)
        return
    usual = run(op, arguments(op))
    for found, expected, full in zip(run(op, given), run(op, given | {"impl": "reference"}), usual, strict=True):
        assert found.dtype == full.dtype
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.isfinite().all()


@pytest.mark.parametrize(("op", "name"), FINITE)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(op: str, name: str, value: float) -> None:
    given = arguments(op)
    given[name][2, 1] = value
    with pytest.raises(ValueError, match=f"expected finite {name}, got NaN or infinity in 1 rows, the first is 2"):
        run(op, given)


@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, name in PAIRS if (op, name) not in FINITE and arguments(op)[name].is_floating_point()],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_does_not_pass_for_one(op: str, name: str, value: float) -> None:
    """It shows in its sample's answer, or that of its cluster, and in no other's; as in the definition."""
    given = arguments(op)
    given[name].view(-1)[-1] = value
    if op == "kmeans_update_delta" and name == "points":
        given["old_assignment"][-1], given["new_assignment"][-1] = 0, 1
    for found, expected in zip(run(op, given), run(op, given | {"impl": "reference"}), strict=True):
        if expected.is_floating_point():
            assert torch.equal(found.isfinite(), expected.isfinite())


IMPLS = "expected impl to be one of auto, .*, got 'gpu'"


@pytest.mark.parametrize("op", OPS)
def test_implementation(op: str) -> None:
    with pytest.raises(ValueError, match=IMPLS):
        run(op, arguments(op) | {"impl": "gpu"})
    for value in (None, 3):
        with pytest.raises(ValueError, match=f"expected impl of type str, got {value}"):
            run(op, arguments(op) | {"impl": value})


@pytest.mark.parametrize(
    ("op", "others", "message"),
    [
        ("flow_interpolate", {"seed": -1}, r"a seed in \[0, 2\*\*32\), got -1"),
        ("flow_interpolate", {"draw": 2**32}, r"a draw in \[0, 2\*\*32\), got 4294967296"),
        ("flow_matching_loss", {"seed": 2**70}, r"a seed in \[0, 2\*\*32\), got 1180591620717411303424"),
        ("flow_matching_loss", {"seed": 1.5}, "seed of type int, got 1.5"),
        ("flow_matching_loss_grad", {"draw": 2**32}, r"a draw in \[0, 2\*\*32\), got 4294967296"),
        ("kmeans_update", {"k": 0}, "k of at least 1, got 0"),
        ("kmeans_update", {"k": 2}, "assignment from 0 to 1, got 0 to 2"),
        ("kmeans_update", {"k": 3.0}, "k of type int, got 3.0"),
        ("kmeans_update", {"k": "3"}, "k of type int, got '3'"),
        ("knn_radius", {"k": 0}, "k from 1 to the 8 points other than the query, got 0"),
        ("knn_radius", {"k": 9}, "k from 1 to the 8 points other than the query, got 9"),
        ("linear_grad_sqnorm", {"bias": "no"}, "bias of type bool, got 'no'"),
        ("pairwise_topk", {"k": -1}, "k from 1 to the 9 points, got -1"),
        ("pairwise_topk", {"k": None}, "k of type int, got None"),
    ],
)
def test_numbers(op: str, others: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^expected {message}"):
        run(op, arguments(op) | others)


def test_assignments_out_of_range() -> None:
    given = arguments("kmeans_update")
    given["assignment"][4] = -1
    with pytest.raises(ValueError, match="expected assignment from 0 to 2, got -1 to 2"):
        run("kmeans_update", given)
    for name in ("old_assignment", "new_assignment"):
        given = arguments("kmeans_update_delta")
        given[name][4] = 3
        with pytest.raises(ValueError, match=f"expected {name} from 0 to 2, got 0 to 3"):
            run("kmeans_update_delta", given)


def test_more_than_int32_can_number() -> None:
    """Sizes beyond 2³¹, in no memory: rows that are all one, and elements that are all one."""
    points = torch.zeros(1, 1).expand(2**31, 1)
    with pytest.raises(ValueError, match=r"expected K below 2\*\*31 centroids, .* got 2147483648"):
        kmeans_assign(torch.zeros(2, 1), points)
    meta = torch.empty(2**33, 4, dtype=torch.float16, device="meta")
    assert kmeans_assign(meta, torch.empty(7, 4, device="meta"))[0].shape == (2**33,)
    with pytest.raises(ValueError, match="equal N, got 8589934592 and 5"):
        kmeans_update(meta, torch.empty(5, dtype=torch.int32, device="meta"), 7)
    assert pairwise_topk(meta[:5], meta, 3)[1].shape == (5, 3)
    assert knn_radius(meta, 3).shape == (2**33,)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_samples_of_more_than_2_31_elements_by_strides(impl: str) -> None:
    """Rows 2³¹ elements apart: memory is reserved for all of it, and touched where the rows are."""
    try:
        whole = torch.empty(2 * 2**31 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("needs 8 GiB of address space")
    far = whole.as_strided((3, 8), (2**31, 1))
    near = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).half()
    far.copy_(near)
    for found, expected in zip(kmeans_assign(far, near[:2], impl=impl), kmeans_assign(near, near[:2]), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(pairwise_topk(near, far, 2, impl=impl)[1], pairwise_topk(near, near, 2)[1])
    hashes = torch.arange(3)
    xt = flow_interpolate(far, near[:, 0], hashes, 1, 2, impl=impl)
    assert torch.equal(xt, flow_interpolate(near, near[:, 0], hashes, 1, 2))
    loss = flow_matching_loss(far, near, hashes, 1, 2, impl=impl)
    assert torch.equal(loss, flow_matching_loss(near, near, hashes, 1, 2))
    sqnorm = linear_grad_sqnorm(far[:, None], near[:, None], True, impl=impl)
    torch.testing.assert_close(sqnorm, linear_grad_sqnorm(near[:, None], near[:, None], True))
    out = attention(*(far[:, None, None],) * 3, impl=impl)
    torch.testing.assert_close(out, near[:, None, None])


def test_sizes_of_the_cases_differ() -> None:
    """Else a swap of two lengths would go unseen."""
    for op in OPS:
        lengths = [SIZES[dimension] for dimension in dimensions(op)]
        assert len(set(lengths)) == len(lengths), op

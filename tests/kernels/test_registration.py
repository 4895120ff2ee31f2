"""Ops are what ``torch.library.custom_op`` makes of them; only that no call imports Dynamo."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from importlib import reload
from typing import Any

import pytest
import torch
from op_cases import arguments
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffprune import kernels
from diffprune.kernels import attention, flow_interpolate, kmeans_update
from diffprune.kernels.registration import CustomOp, custom_op, registered

WITHOUT_DYNAMO = """
import sys
import torch
from diffprune import kernels

points, centroids = torch.randn(9, 4), torch.randn(3, 4)
assignment, _ = kernels.kmeans_assign(points, centroids)
kernels.kmeans_update(points, assignment, 3)
kernels.kmeans_update_delta(points, assignment, assignment, *kernels.kmeans_update(points, assignment, 3))
kernels.pairwise_topk(points, points, 2)
kernels.knn_radius(points, 2)
input, grad_output, direction = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(5, 4)
kernels.linear_grad_sqnorm(input, grad_output, True)
kernels.linear_grad_dot(input, grad_output, direction)
kernels.linear_grad_sqnorm_dot(input, grad_output, direction)
hashes = torch.arange(2)
kernels.flow_interpolate(input, torch.rand(2), hashes, 1, 2)
velocity = input.clone().requires_grad_()
kernels.flow_matching_loss(velocity, input, hashes, 1, 2).sum().backward()
print(velocity.grad.isfinite().all().item(), "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""


@pytest.fixture
def op() -> CustomOp:
    """Twice its argument; but the argument itself, where that is negative."""

    @custom_op("example")
    def example(x: Tensor) -> Tensor:
        return x if (x < 0).any() else x * 2

    @example.register_fake
    def fake(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    return example


def test_no_call_imports_dynamo() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_DYNAMO], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "False", "False"], done.stdout + done.stderr


def test_a_result_must_not_share_an_arguments_memory(op: CustomOp) -> None:
    assert torch.equal(op(torch.ones(2)), torch.full((2,), 2.0))
    with pytest.raises(RuntimeError, match="diffprune::example: a result shares memory with an argument"):
        op(-torch.ones(2))
    assert op(torch.ones(0)).shape == (0,)


def test_going_backward_is_an_error_until_it_is_registered(op: CustomOp) -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="diffprune::example is not differentiable"):
        op(x).sum().backward()
    op.register_autograd(lambda ctx, grad: grad * 2, setup_context=lambda ctx, inputs, output: None)
    op(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    torch.library.opcheck(torch.ops.diffprune.example.default, (x,))


DIFFERENTIABLE = {
    "adaln_modulate": "x",
    "attention": "query",
    "flow_matching_loss": "velocity",
    "gated_residual": "branch",
    "gated_residual_adaln": "gate",
}
"""Op -> an argument to differentiate by."""


def result(op: str, given: dict[str, Any]) -> Tensor:
    """The op's result, of several the last; of "attention" not by PyTorch, which has its own derivatives."""
    found = getattr(kernels, op)(**given, **({"impl": "reference"} if op == "attention" else {}))
    return found[-1] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("op", "name"), DIFFERENTIABLE.items())
def test_no_tangent_is_dropped(op: str, name: str) -> None:
    given = arguments(op)
    value, tangent = given[name], torch.ones_like(given[name])
    instead = re.escape(registered[f"diffprune::{op}"].forward_mode)
    message = f"diffprune::{op} has no forward-mode derivative .*; take {instead}"

    def function(value: Tensor) -> Tensor:
        return result(op, given | {name: value})

    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(function, (value,), (tangent,))
    with pytest.raises(NotImplementedError, match=message):
        torch.vmap(lambda value, tangent: torch.func.jvp(function, (value,), (tangent,)))(value[None], tangent[None])
    for compiled in (function, torch.compile(function, fullgraph=True, backend="eager")):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
            compiled(forward_ad.make_dual(value, tangent))

    def both(value: Tensor) -> Any:
        return torch.func.jvp(function, (value,), (tangent,))

    with pytest.raises(Exception, match="no forward-mode derivative"):  # Dynamo's exception has other ancestors
        torch.compile(both, fullgraph=True, backend="eager")(value)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_what_carries_no_tangent_goes_through(op: str) -> None:
    one, given = torch.ones(()), arguments(op)
    expected = result(op, given)
    found, tangent = torch.func.jvp(lambda factor: factor * result(op, given), (one,), (one,))
    assert torch.equal(found, expected) and torch.equal(tangent, expected)


def test_what_to_take_where_a_tangent_is_wanted() -> None:
    """The expressions in the errors are the ops."""
    for op, arrays in ((op, arguments(op)) for op in ("adaln_modulate", "gated_residual", "gated_residual_adaln")):
        scope = {"F": F, **arrays}
        for expression in registered[f"diffprune::{op}"].forward_mode.removeprefix("x = ").split(" and "):
            scope["x"] = eval(expression, scope)
        torch.testing.assert_close(scope["x"], result(op, arrays))
    with sdpa_kernel(SDPBackend.MATH):
        given = arguments("attention")
        by_query = partial(attention, key=given["key"], value=given["value"])
        _, tangent = torch.func.jvp(by_query, (given["query"],), (given["key"],))
    query, key, value = (given[name].double() for name in ("query", "key", "value"))
    step = 1e-6 * key
    expected = (attention(query + step, key, value) - attention(query - step, key, value)) / 2e-6
    torch.testing.assert_close(tangent.double(), expected, rtol=1e-4, atol=1e-5)
    given = arguments("flow_matching_loss")
    x0 = flow_interpolate(given["x1"], torch.zeros(3), given["hashes"], given["seed"], given["draw"])
    found = eval(registered["diffprune::flow_matching_loss"].forward_mode.partition(", x0")[0], {"x0": x0, **given})
    torch.testing.assert_close(found, result("flow_matching_loss", given))


def test_a_module_may_be_loaded_again() -> None:
    points, assignment = torch.ones(3, 2), torch.tensor([0, 0, 1], dtype=torch.int32)
    expected = kmeans_update(points, assignment, 2)
    again = reload(sys.modules["diffprune.kernels.kmeans_update"]).kmeans_update
    for found in (again(points, assignment, 2), kmeans_update(points, assignment, 2)):
        assert all(map(torch.equal, found, expected))
    torch.library.opcheck(torch.ops.diffprune.kmeans_update.default, (points, assignment, 2))


def test_dynamo_compiles_nothing_of_an_implementation() -> None:
    """Not even where it leaves a function as it is, and looks into those that it calls."""
    graphs = []

    def compile(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    def function(points: Tensor, assignment: Tensor) -> list[Tensor]:
        found = []
        for _ in range(2):
            with pytest.MonkeyPatch.context():  # no graph can be broken in it
                torch._dynamo.graph_break()
                found += torch.ops.diffprune.kmeans_update.default(points, assignment, 2)
        return found

    points, assignment = torch.ones(3, 2), torch.tensor([0, 0, 1], dtype=torch.int32)
    found = torch.compile(function, backend=compile)(points, assignment)
    assert torch.equal(found[0], torch.tensor([[2.0, 2.0], [1.0, 1.0]])) and graphs == []

"""Ops are what ``torch.library.custom_op`` makes of them; only that no call imports Dynamo."""

from __future__ import annotations

import subprocess
import sys
from importlib import reload

import pytest
import torch
from torch import Tensor

from diffprune.kernels import kmeans_update
from diffprune.kernels.registration import CustomOp, custom_op

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

"""Per-sample gradients under DistributedDataParallel: scoring is no training step, and its reducer goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffprune import InputError, per_sample_gradients

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR)


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def losses(model: nn.Module) -> Tensor:
    return model(X).square().mean(dim=1)


def wrapped(**options: Any) -> tuple[nn.Module, DistributedDataParallel, list[int]]:
    """A model, its wrapper, and how many values each reduction had."""
    inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    model, reduced = DistributedDataParallel(inner, **options), []

    def reduce(_, bucket):  # DDP compares annotations with classes, and here they are text
        reduced.append(bucket.buffer().numel())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, reduce)
    return inner, model, reduced


@pytest.mark.parametrize("options", [{}, {"static_graph": True}, {"find_unused_parameters": True}])
def test_training_steps_after_the_block_are_reduced(options):
    inner, model, reduced = wrapped(**options)
    with per_sample_gradients(inner) as expected:
        losses(inner).sum().backward()
    values = sum(parameter.numel() for parameter in inner.parameters())
    for _ in range(3):
        with per_sample_gradients(model) as grads:
            losses(model).sum().backward()
        assert torch.equal(grads.sqnorm, expected.sqnorm) and not reduced
        assert model.require_backward_grad_sync and model.require_forward_param_sync
        losses(model).mean().backward()
        assert sum(reduced) == values, f"{options}: {sum(reduced)} of {values} gradients were reduced"
        reduced.clear()


def test_weight_gradients_that_no_reducer_averages_are_refused():
    inner, model, reduced = wrapped()
    with (
        pytest.raises(InputError, match=r"DistributedDataParallel .* no_sync\(\)"),
        per_sample_gradients(model, weight_gradients=True),
    ):
        pass
    with pytest.raises(InputError, match=r"no_sync\(\)"), per_sample_gradients(inner, weight_gradients=True):
        losses(model)
    with model.no_sync(), per_sample_gradients(model, weight_gradients=True):
        losses(model).sum().backward()
    gradient = inner[0].weight.grad.clone()
    inner.zero_grad()
    with per_sample_gradients(inner, weight_gradients=True):
        losses(inner).sum().backward()
    assert torch.equal(gradient, inner[0].weight.grad) and not reduced


def test_a_wrapper_with_a_static_graph_that_the_block_was_not_given_is_refused():
    inner, model, _ = wrapped(static_graph=True)
    with pytest.raises(InputError, match="give the wrapper to per_sample_gradients"), per_sample_gradients(inner):
        losses(model)

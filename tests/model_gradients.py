"""Per-sample gradients of models that were written elsewhere, and what they have to equal: float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffprune.per_sample import per_sample_gradients

Gradients = list[dict[str, Tensor]]  # for each sample, by parameter name
LossesOf = Callable[[nn.Module, Any], Tensor]  # (model, inputs) -> [B]


def drawn_anew(model: nn.Module) -> nn.Module:
    """In float64, with every parameter and buffer of statistics: published initial values have many zeros and ones."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def weighted_losses(model: Callable[[Any], Tensor], x: Any) -> Tensor:
    """[B]: a loss that no two elements of the output share."""
    y = model(x).flatten(1).sin()
    return (torch.linspace(-1, 2, y.shape[1], dtype=y.dtype) * y).sum(dim=1)


def sample_gradients(losses_of: LossesOf, model: nn.Module, samples: Iterable[Any]) -> Gradients:
    """The definition: torch.autograd.grad of one sample's loss over all trainable parameters, for each sample."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    result = []
    for sample in samples:
        gradients = torch.autograd.grad(losses_of(model, sample).sum(), parameters, allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True))
        result.append(dict(zip(names, zeros, strict=True)))
    return result


def check(losses_of: LossesOf, model: nn.Module, inputs: Any, gradients: Gradients, tolerance: float = 1e-9) -> None:
    """Each layer to the tolerance of its own size, so that small ones count as large ones do.

    The tolerance is for deep models: a library may sum products of a batch in another order than those of one sample,
    and of that 2e-10 was left on one processor.
    """
    generator = torch.Generator().manual_seed(7)
    direction = {name: torch.randn(g.shape, generator=generator).double() for name, g in gradients[0].items()}
    with per_sample_gradients(model, direction=direction, total=True) as grads:
        losses_of(model, inputs).sum().backward()
    sqnorm = torch.stack([sum(g.square().sum() for g in row.values()) for row in gradients])
    dot = torch.stack([sum((row[name] * d).sum() for name, d in direction.items()) for row in gradients])
    size = sqnorm.sqrt() * sum(d.square().sum() for d in direction.values()).sqrt()
    assert ((grads.sqnorm - sqnorm).abs() <= tolerance * sqnorm).all()
    assert ((grads.dot - dot).abs() <= tolerance * size).all()
    assert list(grads.total) == list(gradients[0])
    for name, value in grads.total.items():
        expected = [row[name] for row in gradients]
        floor = 1e-14 * sqnorm.max().sqrt()  # gradients that are zero but for rounding: a bias before a softmax
        assert (value - sum(expected)).norm() <= tolerance * sum(g.norm() for g in expected) + floor, name
    for layer, part in grads.by_layer.items():
        own = [name for name in gradients[0] if name.rpartition(".")[0] == layer]
        expected = torch.stack([sum(row[name].square().sum() for name in own) for row in gradients])
        assert ((part - expected).abs() <= tolerance * expected + 1e-28 * sqnorm).all(), layer

"""Per-sample gradients of random programs, in which every dimension is as long as the batch, against autograd."""

from __future__ import annotations

import random

import pytest
import torch
from model_gradients import check, drawn_anew, sample_gradients, weighted_losses
from torch import Tensor, nn
from torch.nn import functional as F

N = 4  # samples, tokens and features
MOVES = ["permute", "einsum", "stack", "cat", "mean", "roll", "softmax", "cumsum", "gather", "write", "slice"]
MEETINGS = ["constant", "plane", "product", "attend", "linear", "masked", "flat", "scale", "shift", "tokens", "norm"]
STEPS = [*MOVES, *MEETINGS, "convolve", "positions"]


class Program(nn.Module):
    """Moves a batch of [tokens, features] about, and applies weights wherever it then is. No step mixes samples."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.steps = [(self.random.choice(STEPS), self.random.random()) for _ in range(self.random.randint(3, 8))]
        self.linears = nn.ModuleList(nn.Linear(N, N) for _ in self.steps)
        self.norms = nn.ModuleList(nn.LayerNorm(N) for _ in self.steps)
        self.convolutions = nn.ModuleList(nn.Conv1d(N, N, 3, padding=1) for _ in self.steps)
        self.vectors = nn.ParameterList(torch.zeros(N) for _ in self.steps)
        self.tables = nn.ParameterList(torch.zeros(N, N) for _ in self.steps)
        generator = torch.Generator().manual_seed(seed)
        self.constants = torch.randn(len(self.steps), N, N, generator=generator, dtype=torch.float64)  # no buffer

    def forward(self, x: Tensor) -> Tensor:
        order = "btd"  # the dimensions of x
        for place, (step, seed) in enumerate(self.steps):
            x, order = self.step(place, step, random.Random(seed), x, order)
        return x.movedim(order.index("b"), 0)

    def step(self, i: int, step: str, draw: random.Random, x: Tensor, order: str) -> tuple[Tensor, str]:
        batch, constant = order.index("b"), self.constants[i]
        others = [dim for dim in range(3) if dim != batch]
        dim = draw.choice(others)
        across = [N if place == dim else 1 for place in range(3)]  # the shape of what has one dimension of x
        plane = [1 if place == batch else N for place in range(3)]
        if step in ("permute", "einsum"):
            places = draw.sample(range(3), 3)
            names = "".join("xyz"[place] for place in places)
            x = x.permute(places) if step == "permute" else torch.einsum(f"xyz->{names}", x)
            return x, "".join(order[place] for place in places)
        if step == "stack":
            to, name, rest = draw.randrange(3), order[dim], order[:dim] + order[dim + 1 :]
            return torch.stack([one.tanh() for one in x.unbind(dim)], to), rest[:to] + name + rest[to:]
        if step == "write":
            y = torch.zeros_like(x) if draw.random() < 0.5 else torch.zeros(x.shape, dtype=x.dtype)
            y[tuple(slice(place == dim, None) for place in range(3))] = x.narrow(dim, 0, N - 1)
            return y + x, order
        index = torch.arange(N).flip(0).view(across).expand(x.shape)
        anywhere = {
            "mean": lambda: x + x.mean(dim).unsqueeze(dim),
            "roll": lambda: x.roll(1, dim),
            "softmax": lambda: x.softmax(dim),
            "cumsum": lambda: x.cumsum(dim),
            "gather": lambda: x.gather(dim, index),
            "slice": lambda: torch.cat([x.narrow(dim, 1, N - 1), x.narrow(dim, 0, 1)], dim),
            "constant": lambda: x * constant[0].view(across),
            "plane": lambda: x + constant.view(plane),
            "tokens": lambda: (x * self.tables[i].view(plane)).tanh(),
            "scale": lambda: (x * self.vectors[i].view(across)).tanh(),
            "shift": lambda: (x + self.vectors[i].view(across)).cos(),
        }
        where_features_are_last = {
            "linear": lambda: self.linears[i](x).tanh(),
            "masked": lambda: F.linear(x, self.tables[i] * constant).tanh(),
            "flat": lambda: self.linears[i](x.reshape(-1, N)).tanh().reshape(x.shape),
            "norm": lambda: self.norms[i](x),
            "positions": lambda: (x + self.linears[i](constant).view(plane)).sin(),
        }
        where_the_batch_is_first = {
            "product": lambda: (x @ x.mT) @ x / N,
            "attend": lambda: F.scaled_dot_product_attention(x, x.sin(), x),
            "convolve": lambda: self.convolutions[i](x).tanh(),
        }
        if step == "cat":
            along = draw.randrange(3)
            return torch.mul(*torch.cat([x, x.cos()], along).chunk(2, along)), order
        if step in anywhere:
            return anywhere[step](), order
        if step in where_features_are_last:
            return (where_features_are_last[step]() if batch < 2 else x), order
        return (where_the_batch_is_first[step]() if batch == 0 else x), order


@pytest.mark.parametrize("seed", range(60))
def test_random_programs_equal_autograd(seed):
    model = drawn_anew(Program(seed))
    x = torch.randn(N, N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    apart = torch.cat([weighted_losses(model, row) for row in x.split(1)])
    assert torch.allclose(weighted_losses(model, x), apart)  # the test itself: no step mixes samples
    if apart.requires_grad:
        check(weighted_losses, model, x, sample_gradients(weighted_losses, model, x.split(1)), 1e-8)

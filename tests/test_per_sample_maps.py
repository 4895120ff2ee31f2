"""Torch functions that are mapped over the samples, against autograd."""

from __future__ import annotations

import pytest
import torch
from model_gradients import drawn_anew, sample_gradients, weighted_losses
from torch import nn
from torch.nn import functional as F

from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients

T, D = 4, 6


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.scale, self.table = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(T, D))
        self.matrix, self.form = nn.Parameter(torch.zeros(D, 3)), nn.Parameter(torch.zeros(3, 2, D))
        self.cell, self.rnn, self.lstm = nn.GRUCell(D, D), nn.RNNCell(D, D), nn.LSTM(D, D, batch_first=True)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


CASES = {
    "ones beside": lambda m, x: torch.addcmul(torch.ones(len(x), 1, 1, dtype=x.dtype), x, m.scale),
    "zeros beside": lambda m, x: torch.addcmul(torch.zeros_like(x), x, m.scale),
    "new zeros beside": lambda m, x: torch.lerp(x.new_zeros(len(x), D), x[:, 0], m.scale),
    "a table beside": lambda m, x: torch.addcmul(torch.arange(T * D).view(T, D).to(x), x, m.scale),
    "a constant of rows": lambda m, x: torch.einsum(
        "bd,de,be->be", x[:, 0], m.matrix, torch.full((len(x), 3), 2.0).to(x)
    ),
    "a form": lambda m, x: F.bilinear(torch.ones(len(x), 2, dtype=x.dtype), x[:, 0], m.form),
    "a table over tokens": lambda m, x: torch.maximum(x, m.table.expand(T, D)),
    "a row over tokens": lambda m, x: torch.maximum(x, m.scale.expand(T, D)),
    "a row over samples": lambda m, x: torch.maximum(x[:, 0], m.scale.expand(len(x), D)),
    "a row for each token": lambda m, x: torch.einsum("btd,td->bt", x, m.scale.expand(T, D)),
    "samples last": lambda m, x: torch.einsum("td,de->et", x[:, 0], m.matrix).T,
    "tokens first": lambda m, x: torch.maximum(x.transpose(0, 1), m.scale).transpose(0, 1),
    "a cell": lambda m, x: m.cell(x[:, 0]),
    "a cell of tanh": lambda m, x: m.rnn(x[:, 0], x[:, 1].cos()),
}


@pytest.mark.parametrize("batch", [1, 2, 3, T, D])
@pytest.mark.parametrize("name", CASES)
def test_equal_autograd(name, batch):
    model = drawn_anew(Model(CASES[name]))
    x = torch.randn(batch, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = sample_gradients(weighted_losses, model, x.split(1))
    with per_sample_gradients(model, fallback="vmap", total=True) as grads:
        losses = weighted_losses(model, x)
        losses.sum().backward()
    assert torch.allclose(losses, weighted_losses(model, x))
    expected = torch.stack([sum(g.square().sum() for g in row.values()) for row in gradients])
    assert grads.sqnorm.shape == (batch,) and torch.allclose(grads.sqnorm, expected, rtol=1e-10)
    for key, value in grads.total.items():
        assert torch.allclose(value, sum(row[key] for row in gradients), rtol=1e-10, atol=1e-12), key


def written(model, x):
    y = x * 1
    y[:, 0] = model.scale
    return y


REFUSED = {
    "written": (written, "parameter scale: __setitem__ cannot be mapped"),
    "in place": (lambda m, x: (x * 1).clamp_(max=m.scale), "parameter scale: clamp_ cannot be mapped.*in place"),
    "long short-term memory": (lambda m, x: m.lstm(x)[0], "parameter lstm.*: lstm cannot be mapped over the samples"),
    "samples summed": (lambda m, x: torch.einsum("btd,d->t", x, m.scale) + x, "parameter scale: einsum cannot"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mapped_is_refused_by_name(name):
    function, message = REFUSED[name]
    x = torch.ones(3, T, D)
    with (
        pytest.raises(InputError, match=message) as error,
        per_sample_gradients(model := Model(function), fallback="vmap"),
    ):
        model(x)
    assert "fallback='vmap'" not in str(error.value)

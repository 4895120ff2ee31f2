"""Per-sample gradients where something else is as long as the batch, or where the batch is moved, against autograd."""

from __future__ import annotations

import threading
from collections import UserDict
from dataclasses import dataclass

import pytest
import torch
from model_gradients import check, drawn_anew, sample_gradients, weighted_losses
from torch import nn
from torch.nn import functional as F

from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients

T, D = 4, 6
BATCHES = (1, 2, 3, T, 5, D, 9)  # as long as tokens and features, and neither


class Model(nn.Module):
    """A linear layer, a table of positions, a scale and a layer of one feature, for whatever `function` does."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.table, self.one = nn.Embedding(T, D), nn.Linear(1, D)
        self.scale, self.per_token = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(T))
        self.mask, self.places = torch.tril(torch.ones(D, D)).double(), torch.arange(T)  # no buffers
        self.noise = torch.randn(T, D, generator=torch.Generator().manual_seed(3)).double()
        self.register_buffer("waves", torch.randn(T, D, generator=torch.Generator().manual_seed(4)))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def inputs(batch: int) -> torch.Tensor:
    return torch.randn(batch, T, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_by_one(model, x):
    y = x.new_zeros(len(x), T, D)
    for i in range(len(x)):
        y[i, 1:] = x[i, 1:].cos()
        y[i, 0] = x[i, 1]
    return y


def written(model, x):
    y = torch.zeros(len(x), T, D, dtype=x.dtype)
    y[:, 1:] = model.layer(x[:, :-1]).tanh()
    return y


CASES = {
    # Constants, whatever their length
    "a mask that is kept": lambda m, x: F.linear(x, m.layer.weight * m.mask),
    "a mask in the type of x": lambda m, x: F.linear(x, m.layer.weight * m.mask.to(x)),
    "positions that are kept": lambda m, x: x.sin() * m.table(m.places),
    "positions from numbers": lambda m, x: x.sin() * m.table(torch.tensor([0, 1, 2, 3])),
    "positions of new ones": lambda m, x: x.sin() * m.table(x.new_ones(T).cumsum(0).long() - 1),
    "positions of a row": lambda m, x: x.sin() * m.table(torch.ones_like(x[0, :, 0]).cumsum(0).long() - 1),
    "a buffer in the type of x": lambda m, x: x.sin() * m.layer(m.waves.type_as(x)),
    "a buffer viewed as x": lambda m, x: x.sin() * m.layer(m.waves.expand_as(x[:1])[0]),
    "a grid through a layer": lambda m, x: x.sin() * m.one(torch.linspace(0, 1, T).to(x)[:, None]),
    "noise on a weight": lambda m, x: x.sin() * m.layer(m.table.weight + m.noise * m.scale),
    "noise of the batch": lambda m, x: m.layer(torch.ones(len(x), T, D, dtype=x.dtype) * m.scale) * x.cos(),
    "a token of each row": lambda m, x: m.layer(x)[torch.arange(len(x)), m.places[1]].cos(),
    "tokens of each row": lambda m, x: m.layer(x)[torch.arange(len(x))[:, None], m.places[None, :2]].cos(),
    "a scale of each row": lambda m, x: m.layer(x) * (torch.ones(len(x), 1, 1, dtype=x.dtype) * m.scale).exp(),
    "a state of zeros": lambda m, x: (m.out(x.new_zeros(len(x), D)) + m.layer(x[:, 0])).tanh(),
    "a state of zeros like": lambda m, x: (m.out(torch.zeros_like(x[:, 0])) + m.layer(x[:, 0])).tanh(),
    "class prompts": lambda m, x: m.layer(x) @ m.out(m.noise).T,
    # The batch, wherever it goes
    "steps stacked": lambda m, x: m.out(torch.stack([m.layer(x[:, t]).tanh() for t in range(T)])).transpose(0, 1),
    "steps stacked second": lambda m, x: m.out(torch.stack([m.layer(x[:, t]).tanh() for t in range(T)], 1)),
    "copies stacked": lambda m, x: (
        torch.stack([x[:, 0] * i for i in range(1, T + 1)]) * m.per_token[:, None, None]
    ).transpose(0, 1),
    "einsum": lambda m, x: m.out(torch.einsum("btd->tbd", m.layer(x)).tanh()).transpose(0, 1),
    "einsum with a constant": lambda m, x: m.out(torch.einsum("btd,te->bed", m.layer(x), m.noise)),
    "tensordot": lambda m, x: (
        (torch.tensordot(torch.eye(D, dtype=x.dtype), x[:, 0], dims=([1], [1])) * m.scale[:, None]).T
    ),
    "adjoint": lambda m, x: (m.layer(x[:, 0]).adjoint() * m.scale[:, None]).H.tanh(),
    "a product with a constant": lambda m, x: ((torch.eye(D, dtype=x.dtype) @ x[:, 0].T) * m.scale[:, None]).T,
    "broadcast_tensors": lambda m, x: m.layer(torch.broadcast_tensors(x[:, 0], torch.ones(T, 1, 1))[0]).sum(0),
    "a dimension in front": lambda m, x: m.layer(x[:, 0].cos() * m.noise[:, :1, None]).tanh().sum(0),
    "a weight in front": lambda m, x: m.out((m.layer(x[:, 0]) * m.per_token[:, None, None]).tanh()).sum(0),
    "tokens first, averaged": lambda m, x: m.out(m.layer(x.transpose(0, 1)).tanh().mean(0)),
    "two batches in one": lambda m, x: torch.mul(*m.layer(torch.cat([x, x.cos()])).tanh().chunk(2)),
    "two batches, sliced": lambda m, x: m.out((y := m.layer(torch.cat([x, x.cos()])).tanh())[: len(x)] - y[len(x) :]),
    "written into zeros": lambda m, x: m.out(written(m, x)),
    "each row written by itself": lambda m, x: m.out(one_by_one(m, x)),
    "tokens picked": lambda m, x: m.out(m.layer(x).gather(1, m.places.flip(0)[:, None].expand(len(x), T, D))),
    "windows": lambda m, x: m.out(m.layer(x).as_strided((len(x), 3, 2, D), (T * D, D, D, 1)).flatten(2)[..., :D]),
    "windows of tokens first": lambda m, x: m.out(
        m.layer(x.transpose(0, 1))
        .transpose(0, 1)
        .as_strided((len(x), 3, 2, D), (D, len(x) * D, len(x) * D, 1))[:, :, 1]
    ),
    "queries": lambda m, x: F.scaled_dot_product_attention(m.out(m.table.weight.expand(len(x), -1, -1)), x, m.layer(x)),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CASES)
def test_equal_autograd_at_every_batch_size(name, batch):
    model, x = drawn_anew(Model(CASES[name])), inputs(batch)
    check(weighted_losses, model, x, sample_gradients(weighted_losses, model, x.split(1)))


REFUSED = {
    "rot90": lambda m, x: m.out(torch.rot90(m.layer(x)[:, 0], dims=(1, 0))),
    "samples multiplied": lambda m, x: m.layer(x)[:, 0] @ m.out(x[:, 1]).T,
    "samples against samples": lambda m, x: m.layer(x)[:, :1] * m.out(x[:, 1]),
    "windows across samples": lambda m, x: m.out(
        m.layer(x.transpose(0, 1)).transpose(0, 1).as_strided((T, 2, D), (D, D, 1))
    ),
    "chosen across": lambda m, x: torch.where(x[:, 0] > 0, x, m.scale),
    "samples compared": lambda m, x: F.cosine_similarity(m.layer(x)[:, None, 0], m.out(x)[None, :, 0], dim=-1),
    "windows of samples": lambda m, x: m.out(F.pad(m.layer(x).unfold(0, 2, 1)[..., 0], (0, 0, 0, 0, 0, 1))),
    "differences of samples": lambda m, x: m.out(F.pad(m.layer(x).diff(dim=0), (0, 0, 0, 0, 0, 1))),
    "written across": lambda m, x: m.out(across(m, x)),
}


def across(model, x):
    y = model.layer(x)[:, :, 0].sin()
    z = torch.zeros(T, T, D, dtype=x.dtype)
    z[:, :, 0] = y.T
    z[:, 0] = x[:, 0].clone()
    return z


@pytest.mark.parametrize("name", REFUSED)
def test_samples_that_meet_across_dimensions_are_refused(name):
    model, x = drawn_anew(Model(REFUSED[name])), inputs(T)
    with pytest.raises(InputError, match=r"samples|batch"), per_sample_gradients(model):
        weighted_losses(model, x).sum().backward()


def test_a_constant_argument_as_long_as_the_batch_is_refused_where_it_shows():
    class Given(Model):
        def forward(self, x, places):
            return x.sin() * self.table(places)

    for batch in (3, T):
        model, x = drawn_anew(Given(None)), inputs(batch)
        if batch == T:
            with pytest.raises(InputError, match=r"expected|samples"), per_sample_gradients(model):
                model(x, torch.arange(T)).square().sum().backward()
        else:
            with per_sample_gradients(model) as grads:
                model(x, torch.arange(T)).square().sum().backward()
            assert grads.sqnorm.shape == (batch,)


EXPANDED = {
    "averaged": lambda x, y: x + y.mean(0),
    "against tokens": lambda x, y: x * y,
    "summed over": lambda x, y: torch.einsum("btd,td->bd", x, y),
    "attended to": lambda x, y: x @ y.T @ y,
}


@pytest.mark.parametrize("use", EXPANDED)
def test_a_parameter_expanded_to_as_many_rows_as_samples_is_not_taken_for_them(use):
    def function(model, x):
        return EXPANDED[use](x, model.layer(model.scale.expand(T, D)).tanh())

    for batch in (T,) if use == "summed over" else (3, T):  # einsum has no rule
        model, x = drawn_anew(Model(function)), inputs(batch)
        if batch == T:
            with pytest.raises(InputError, match=r"samples"), per_sample_gradients(model):
                weighted_losses(model, x).sum().backward()
        else:
            check(weighted_losses, model, x, sample_gradients(weighted_losses, model, x.split(1)))


@dataclass
class Images:
    image: torch.Tensor
    label: torch.Tensor


@dataclass(slots=True)
class Hidden:
    """Nothing sees into it."""

    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize("kind", [Images, Hidden, lambda image, label: UserDict(image=image, label=label)])
def test_a_batch_in_an_object(kind):
    class Both(Model):
        def forward(self, batch):
            image, label = batch.values() if isinstance(batch, UserDict) else (batch.image, batch.label)
            places = self.table(torch.arange(T))  # comes first, and is none
            image = self.layer(image) + places
            key = self.table(label)
            return image * key.mean(1, keepdim=True) if kind is Hidden else image + F.softmax(image @ key.mT, -1) @ key

    model, x = drawn_anew(Both(None)), inputs(3)
    label = torch.randint(0, T, (3, 2), generator=torch.Generator().manual_seed(2))

    def losses(model, batch):
        return model(batch).square().flatten(1).sum(1)

    rows = [kind(x[i : i + 1], label[i : i + 1]) for i in range(3)]
    check(losses, model, kind(x, label), sample_gradients(losses, model, rows))


def test_a_batch_in_an_object_that_is_given_by_name():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, D)

        def forward(self, x, context=None):
            return torch.bmm(self.layer(x), self.layer(context.image).mT)

    model, x = drawn_anew(Asks()), inputs(5)
    calls = lambda model, x: weighted_losses(lambda x: model(x, context=Images(x.cos(), x)), x)  # noqa: E731
    check(calls, model, x, sample_gradients(calls, model, x.split(1)))


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_that_is_made_in_the_block(batch):
    model = drawn_anew(nn.Linear(D, D))
    losses = lambda model, x: weighted_losses(lambda x: F.linear(x, model.weight, model.bias), x)  # noqa: E731
    expected = sample_gradients(losses, model, inputs(batch).split(1))
    with per_sample_gradients(model) as grads:
        losses(model, inputs(batch)).sum().backward()
    sqnorm = torch.stack([sum(g.square().sum() for g in row.values()) for row in expected])
    torch.testing.assert_close(grads.sqnorm, sqnorm)


@pytest.mark.parametrize("batch", BATCHES)
def test_a_method_that_begins_with_positions(batch):
    """What a part of the model gets from outside of it is not the batch if the loop made it."""
    model = drawn_anew(Model(lambda m, x: m.layer(x + m.table(torch.arange(T))).tanh()))
    losses = lambda model, x: weighted_losses(model.forward, x)  # noqa: E731
    check(losses, model, inputs(batch), sample_gradients(losses, model, inputs(batch).split(1)))


def test_products_of_two_precisions_under_autocast():
    """At a batch as long as the tokens, where shapes are run without autocast."""
    model, x = nn.Linear(D, D), inputs(T).float()
    losses = lambda model, x: weighted_losses(lambda x: model(x) @ x.mT, x)  # noqa: E731
    found = {}
    for batch in (T, T - 1):
        with per_sample_gradients(model) as grads, torch.autocast("cpu", torch.bfloat16):
            losses(model, x[:batch]).sum().backward()
        found[batch] = grads.sqnorm
    torch.testing.assert_close(found[T][: T - 1], found[T - 1], rtol=0.05, atol=0)


@pytest.mark.parametrize("batch", [1, T, 5])
def test_a_list_of_samples_is_refused(batch):
    model = drawn_anew(Model(lambda m, x: m.layer(torch.stack(x))))
    with pytest.raises(InputError, match=f"got a list of {batch}: stack the samples"), per_sample_gradients(model):
        weighted_losses(model, list(inputs(batch)))


def test_an_empty_batch_is_refused():
    model = Model(lambda m, x: m.layer(x))
    with pytest.raises(InputError, match="at least one sample"), per_sample_gradients(model):
        model(torch.zeros(0, T, D))


def test_blocks_in_two_threads_do_not_disturb_each_other():
    """One is held inside a function that is written in Python, which the other one calls meanwhile."""
    inside, go_on, found = threading.Event(), threading.Event(), {}

    def run(name: str, mask: torch.Tensor) -> None:
        def attend(m, x):
            x = x.transpose(0, 1)
            weight = torch.cat([m.layer.weight] * 3)
            options = (None, None, None, False, 0.0, m.out.weight, m.out.bias)
            return F.multi_head_attention_forward(x, x, x, D, 2, weight, *options, attn_mask=mask)[0].transpose(0, 1)

        model = drawn_anew(Model(attend))
        with per_sample_gradients(model) as grads:
            weighted_losses(model, inputs(3)).sum().backward()
        found[name] = grads.sqnorm

    class Waiting(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            inside.set()
            assert go_on.wait(30)
            return super().__torch_function__(func, types, args, kwargs or {})

    mask = torch.zeros(T, T, dtype=torch.float64)
    first = threading.Thread(target=run, args=("first", mask.as_subclass(Waiting)))
    second = threading.Thread(target=run, args=("second", mask))
    first.start()
    assert inside.wait(30)
    second.start()
    second.join()
    go_on.set()
    first.join()
    assert torch.equal(found["first"], found["second"])

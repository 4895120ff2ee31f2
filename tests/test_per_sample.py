"""Per-sample norms and dots against float64 autograd, one sample at a time, for every rule and every odd use."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path

import pytest
import torch
from model_gradients import sample_gradients
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffprune import gradient_rules
from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients
from diffprune.weight_tensors import _Call

B = 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """All weights nonzero, float64."""
    model = model.double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=100 + seed) * 0.3
    return model


def losses_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
    return (weights * y.sin()).flatten(1).sum(dim=1)  # a loss that no two output elements share


def check(model: nn.Module, x: torch.Tensor, rows_per_sample: int = 1, float32: float = 2e-6) -> None:
    """Norms, their parts and dots of a float64 model, and in float32, too."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = sample_gradients(losses_of, model, list(x.split(rows_per_sample)))
    direction = {name: randn(*gradients[0][name].shape, seed=7) for name in names}
    sqnorm = torch.stack([sum(g.square().sum() for g in row.values()) for row in gradients])
    dot = torch.stack([sum((row[name] * direction[name]).sum() for name in names) for row in gradients])
    size = sqnorm.sqrt() * sum(d.square().sum() for d in direction.values()).sqrt()  # dots may cancel
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, float32)):
        clone = copy.deepcopy(model).to(dtype)
        with per_sample_gradients(clone, direction=direction, rows_per_sample=rows_per_sample, total=True) as grads:
            losses_of(clone, x.to(dtype) if x.is_floating_point() else x).sum().backward()
        assert grads.sqnorm.dtype == grads.dot.dtype == torch.float64 and grads.sqnorm.shape == sqnorm.shape
        assert ((grads.sqnorm - sqnorm).abs() <= tolerance * sqnorm).all()
        assert ((grads.dot - dot).abs() <= tolerance * size).all()
        assert list(grads.total) == names
        for name, value in grads.total.items():
            expected = sum(row[name] for row in gradients)
            assert value.dtype == torch.float64 and value.shape == expected.shape
            assert (value - expected).norm() <= tolerance * sum(row[name].norm() for row in gradients), name
        for layer, part in grads.by_layer.items():
            own = [name for name in names if name.rpartition(".")[0] == layer]
            expected = torch.stack([sum(row[name].square().sum() for name in own) for row in gradients])
            assert ((part - expected).abs() <= tolerance * sqnorm).all(), layer
        assert all(p.grad is None for p in clone.parameters())
        assert all(
            isinstance(p, nn.Parameter)
            for module in clone.modules()
            for p in module._parameters.values()
            if p is not None
        )
    if rows_per_sample == 1:
        shuffled = sqnorm.sort().values  # the test itself: samples must differ for it to mean anything
        assert len(x) == 1 or (shuffled[1:] > shuffled[:-1]).all()


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Scaled(nn.Module):
    """By a weight times a constant that is expanded to the batch, wherever that is."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.register_buffer("constant", torch.arange(1.0, width + 1))

    def forward(self, x):
        return x + self.weight * self.constant.to(x.dtype).expand_as(x)


def shuffled_tokens(x):
    """Along the second dimension of [B, T, D], each sample's by itself."""
    order = x.detach().sum(dim=2).argsort(dim=1)
    x = x.take_along_dim(order[:, :, None], dim=1).roll(1, 1).flip(1).index_select(1, torch.arange(x.shape[1]).roll(1))
    x = x.sort(dim=1).values.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))
    x = x.sort().values + x.topk(x.shape[2]).values
    return torch.zeros_like(x).index_add(1, torch.arange(x.shape[1]).roll(2), x)


PICKED = {
    "index_select": lambda x: x.index_select(0, torch.arange(len(x)).flip(0)),
    "an index": lambda x: x[torch.arange(len(x)).flip(0)],
    "a mask": lambda x: x[x.detach().sum(dim=1) > -99],
    "gather": lambda x: x.gather(0, torch.arange(len(x)).flip(0)[:, None].expand_as(x)),
    "take_along_dim": lambda x: torch.take_along_dim(x, torch.arange(len(x)).flip(0)[:, None], dim=0),
    "sort": lambda x: x.sort(dim=0).values,
    "sort, by keyword": lambda x: torch.sort(input=x, dim=0)[0],
    "topk": lambda x: x.topk(len(x), dim=0).values,
    "roll": lambda x: x.roll(1, 0),
    "roll through all": lambda x: x.roll(1),
    "flip": lambda x: x.flip(0),
    "flip of several": lambda x: torch.flip(x, dims=(1, 0)),
    "masked_select": lambda x: x.masked_select(x.detach() > -99).view_as(x),
    "index_add": lambda x: torch.zeros_like(x).index_add(0, torch.arange(len(x)).flip(0), x),
    "index_add_": lambda x: torch.zeros_like(x).index_add_(0, torch.arange(len(x)).flip(0), x),
    "index_put": lambda x: torch.zeros_like(x).index_put((torch.arange(len(x)).flip(0),), x),
    "scatter": lambda x: torch.zeros_like(x).scatter(0, torch.arange(len(x)).flip(0)[:, None].expand_as(x), x),
    "written by an index": lambda x: written(x, torch.arange(len(x)).flip(0)),
}


def written(x, index):
    out = torch.zeros_like(x)
    out[index] = x
    return out


class Picking(nn.Module):
    """Rows of a table by numbers that the samples have, after what `look_up(table, numbers)` does."""

    def __init__(self, *shape, look_up):
        super().__init__()
        self.table, self.look_up = nn.Parameter(torch.zeros(shape)), look_up

    def forward(self, x):
        return self.look_up(self.table, x).sin()


LOOKED_UP = {
    "an index": ((B, 3), lambda table, x: table[x]),
    "an index, in a tuple": ((B, 3), lambda table, x: table[(x.int(),)]),
    "from the end": ((B, 3), lambda table, x: table[-x - 1]),
    "numbers": ((B,), lambda table, x: table[x]),
    "matrices": ((B, 2, B), lambda table, x: table[x]),
    "index_select": ((B, 3), lambda table, x: table.index_select(0, x.flatten()).unflatten(0, x.shape)),
    "of one token": ((B, 3), lambda table, x: torch.index_select(table, 0, x[:, 0]) + table[x[:, 1]]),
    "tokens first": ((B, 3), lambda table, x: table[x.T].transpose(0, 1)),
    "of a scaled table": ((B, 3), lambda table, x: F.normalize(table, dim=1)[x]),
    "tied": ((B, 3), lambda table, x: table[x] @ table.T),
}


class Queries(nn.Module):
    """Learned queries, keys or values beside those of the samples, which may be as many as anything else."""

    def __init__(self, attend):
        super().__init__()
        self.learned, self.linear = nn.Parameter(torch.zeros(1, 2, B, 3)), nn.Linear(6, 6)
        self.attend = attend

    def forward(self, x):
        heads = self.linear(x).unflatten(2, (2, 3)).transpose(1, 2)
        return self.attend(self.learned, heads).transpose(1, 2).flatten(2)


def by_hand(query, key, value):
    return (query @ key.mT).softmax(dim=-1) @ value


def by_bmm(query, key, value):
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    return torch.bmm(query.bmm(key.mT).softmax(dim=-1), value).unflatten(0, (-1, 2))


ATTENTION = F.scaled_dot_product_attention
QUERIES = {
    "repeated": lambda own, x: ATTENTION(own.repeat(len(x), 1, 1, 1), x, x),
    "expanded": lambda own, x: ATTENTION(own.expand(len(x), -1, -1, -1), x, x),
    "one for all": lambda own, x: ATTENTION(own, x, x),
    "keys and values": lambda own, x: ATTENTION(x, own.repeat(len(x), 1, 1, 1), own.sin().expand(len(x), -1, -1, -1)),
    "with a bias": lambda own, x: ATTENTION(own.expand(len(x), -1, -1, -1), x, x, own[0].sum(dim=2, keepdim=True)),
    "by hand, repeated": lambda own, x: by_hand(own.repeat(len(x), 1, 1, 1), x, x),
    "by hand, one for all": lambda own, x: by_hand(own, x, x),
    "by hand, keys and values": lambda own, x: by_hand(x, own, own.repeat(len(x), 1, 1, 1)),
    "by bmm": lambda own, x: by_bmm(own.repeat(len(x), 1, 1, 1), x, x),
    "by bmm, keys and values": lambda own, x: by_bmm(x, *[own.repeat(len(x), 1, 1, 1)] * 2),
}


class Turned(nn.Linear):
    """By angles that are looked up in one row of a batch of positions."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        angles = (x.detach().flatten(1) > 9).long()[0, :4] + torch.arange(4)
        return super().forward(x) * angles.cos()


CASES = {
    "linear": (lambda: nn.Linear(5, 3), (B, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), (B, 5)),
    "linear over tokens": (lambda: nn.Linear(5, 3), (B, 7, 5)),
    "linear over a grid": (lambda: nn.Linear(5, 3), (B, 2, 3, 5)),
    "one sample": (lambda: nn.Linear(5, 3), (1, 7, 5)),
    "mlp with in-place relu": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        (B, 2, 5),
    ),
    "patches": (lambda: nn.Conv2d(3, 5, kernel_size=2, stride=2), (B, 3, 6, 4)),
    "conv with padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 3)),
        (B, 3, 5, 7),
    ),
    "conv with everything": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        (B, 3, 7, 8),
    ),
    "conv with groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2, padding=1), (B, 4, 5, 7)),
    "conv with a kernel for each channel": (
        lambda: nn.Conv1d(4, 8, 3, groups=4, padding="same", dilation=2),
        (B, 4, 9),
    ),
    "conv 'same', an even size": (lambda: nn.Conv2d(2, 3, (2, 5), padding="same"), (B, 2, 5, 6)),
    "conv with circular padding": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (B, 2, 4, 5)),
    "conv over time": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.PReLU(4), nn.Conv1d(4, 2, 2, stride=2)), (B, 3, 8)),
    "conv over volumes": (lambda: nn.Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (B, 2, 3, 4, 5)),
    "transposed conv": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=(1, 2)),
        (B, 4, 3, 4),
    ),
    "transposed conv over time": (lambda: nn.ConvTranspose1d(3, 2, 4, stride=3, bias=False), (B, 3, 5)),
    "many tokens": (lambda: nn.Sequential(nn.Linear(5, 70), nn.SiLU(), nn.Linear(70, 3)), (B, 40, 5)),
    "rms norm": (lambda: nn.Sequential(nn.Linear(5, 5), nn.RMSNorm(5), nn.Linear(5, 5), nn.RMSNorm(5)), (B, 3, 5)),
    "instance norm": (lambda: nn.InstanceNorm1d(4, affine=True), (B, 4, 6)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)),
        (B, 3, 5),
    ),
    "tokens folded into the batch": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.Flatten(0, 1), nn.Linear(4, 3), nn.LayerNorm(3), nn.Unflatten(0, (-1, 3))
        ),
        (B, 3, 5),
    ),
    "batch second": (
        lambda: nn.Sequential(
            Lambda(lambda x: x.permute(1, 0, 2)), nn.Linear(5, 4), nn.LayerNorm(4), Lambda(lambda x: x.transpose(0, 1))
        ),
        (B, B, 5),
    ),
    "each row repeated": (
        lambda: nn.Sequential(
            nn.Linear(5, 4),
            Lambda(lambda x: x.repeat_interleave(3, dim=0, output_size=3 * len(x)).repeat_interleave(2, dim=-1)),
            nn.Linear(8, 3),
            nn.Unflatten(0, (-1, 3)),
        ),
        (B, 5),
    ),
    "the batch repeated": (
        lambda: nn.Sequential(
            nn.Linear(5, 4),
            Lambda(lambda x: x.transpose(0, 1).repeat(2, 3, 1)),
            nn.Linear(4, 3),
            Lambda(lambda x: x.unflatten(1, (3, -1)).movedim(2, 0)),
        ),
        (B, 2, 5),
    ),
    "the batch expanded": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), Lambda(lambda x: x.expand(B, -1, -1)), nn.Linear(4, 3), Lambda(lambda x: x.transpose(0, 1))
        ),
        (B, 5),
    ),
    "keywords only": (
        lambda: nn.Sequential(
            nn.Linear(5, 4),
            Lambda(lambda x: torch.transpose(input=x, dim0=0, dim1=1)),
            nn.Linear(4, 4),
            Lambda(lambda x: torch.transpose(input=x, dim0=0, dim1=1)),
            Lambda(lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x)),
        ),
        (B, B, 5),
    ),
    "a constant in the shape of a transposed batch": (
        lambda: nn.Sequential(Lambda(lambda x: x.transpose(0, 1)), Scaled(B), Lambda(lambda x: x.transpose(0, 1))),
        (B, B, B),
    ),
    "tokens sorted, picked and written": (
        lambda: nn.Sequential(nn.Linear(5, 4), Lambda(shuffled_tokens), nn.Linear(4, 3)),
        (B, B, 5),
    ),
    "angles of one row": (lambda: nn.Sequential(Turned(), nn.Linear(4, 3)), (B, 3, 4)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm(5)), (B, 7, 5)),
    "layer norm without tokens or bias": (lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5, bias=False)), (B, 5)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((2, 5)), (B, 3, 2, 5)),
    "layer norm without affine": (
        lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5, elementwise_affine=False)),
        (B, 5),
    ),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(3, 6)), (B, 3, 4, 5)),
    "group norm without space": (lambda: nn.GroupNorm(2, 6), (B, 6)),
}


ILL_CONDITIONED = ("rms norm", "tokens folded into the batch")  # float32 autograd itself is off by 6e-6


@pytest.mark.parametrize("name", CASES)
def test_rules_equal_float64_autograd(name):
    make, shape = CASES[name]
    check(randomised(make()), randn(*shape, seed=1), float32=2e-5 if name in ILL_CONDITIONED else 2e-6)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_rows_hit_twice_add_up_before_the_norm(padding_idx):
    model = randomised(nn.Sequential(nn.Embedding(6, 5, padding_idx=padding_idx), nn.Linear(5, 3)))
    check(model, torch.tensor([[1, 1, 1, 2], [0, 1, 2, 3], [5, 5, 0, 0], [2, 2, 2, 4]]))
    check(model, torch.tensor([1, 5, 3, 0]))


@pytest.mark.parametrize("name", ["linear over tokens", "conv with padding", "layer norm", "group norm"])
def test_rows_of_one_sample_are_summed(name):
    make, shape = CASES[name]
    check(randomised(make()), randn(6, *shape[1:], seed=1), rows_per_sample=3)


def test_embedding_rows_of_one_sample_are_summed():
    check(randomised(nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 2))), torch.tensor([1, 1, 2, 2, 0, 1]), 2)


class Twice(nn.Module):
    """One layer of each kind, called twice with different numbers of tokens."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.conv = nn.Linear(5, 5), nn.LayerNorm(5), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        x = self.linear(self.norm(self.linear(x[:, :2]).sin() + self.norm(x[:, 1:])))
        return self.conv(self.conv(x[:, None]).cos())


def test_layers_called_twice_are_summed_before_the_norm():
    check(randomised(Twice()), randn(B, 3, 5, seed=1))


def test_tied_linear_layers_are_summed_before_the_norm():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    check(randomised_shared(model), randn(B, 3, 5, seed=1))


def randomised_shared(model: nn.Module) -> nn.Module:
    model = model.double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed) * 0.3)
    return model


@pytest.mark.parametrize(
    "frozen", [["0.weight"], ["0.bias"], ["0.weight", "0.bias"], ["1.weight"], ["1.bias"], ["2.weight", "2.bias"]]
)
def test_frozen_parameters_are_left_out(frozen):
    model = randomised(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    check(model, randn(B, 2, 5, seed=1))


def test_layers_without_a_gradient_count_as_zero():
    """One layer that never runs, one whose output is dropped, one whose output is detached, one call of two unused."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.dropped, self.detached = (nn.Linear(5, 5) for _ in range(4))

        def forward(self, x):
            self.dropped(x)
            self.used(x.cos())
            return self.used(x + self.detached(x).detach())

    check(randomised(Model()), randn(B, 5, seed=1))


def test_an_input_that_requires_grad_still_gets_its_gradient():
    model, x = randomised(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))), randn(B, 5, seed=1)
    plain, hooked = x.clone().requires_grad_(), x.clone().requires_grad_()
    losses_of(model, plain).sum().backward()
    with per_sample_gradients(model):
        losses_of(model, hooked).sum().backward()
    assert torch.equal(plain.grad, hooked.grad)


def test_weight_gradients_are_left_as_usual_on_request():
    x = randn(B, 3, 5, seed=1)
    plain, hooked = (randomised(Twice()) for _ in range(2))
    for parameter in [*plain.parameters(), *hooked.parameters()]:
        parameter.grad = torch.ones_like(parameter)  # a gradient that is there already is added to
    losses_of(plain, x).sum().backward()
    parameters = list(hooked.parameters())  # inside, the model's own are stand-ins
    with per_sample_gradients(hooked, weight_gradients=True) as grads:
        losses_of(hooked, x).sum().backward()
        for a, b in zip(plain.parameters(), parameters, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-14, atol=1e-14)
    reference = sample_gradients(losses_of, plain, list(x.split(1)))
    assert torch.allclose(grads.sqnorm, torch.stack([sum(g.square().sum() for g in r.values()) for r in reference]))


def test_train_mode_and_a_forward_without_grad_inside():
    model = randomised(nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.0), nn.Linear(4, 3))).train()
    x = randn(B, 5, seed=1)
    with per_sample_gradients(model) as grads:
        with torch.no_grad():
            model(x[:2])
        losses_of(model, x).sum().backward()
        inside = grads.sqnorm
    assert torch.equal(inside, grads.sqnorm) and model.training
    reference = sample_gradients(losses_of, model, list(x.split(1)))
    assert torch.allclose(inside, torch.stack([sum(g.square().sum() for g in r.values()) for r in reference]))


def test_what_a_layer_saw_is_let_go_once_its_sums_are_made():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gc.collect()
    with per_sample_gradients(model):
        loss = model(torch.ones(3, 4)).sum()  # keeps the graph, and with it its hooks
        loss.backward()
        calls = [thing for thing in gc.get_objects() if type(thing) is _Call]
        assert len(calls) == 2 and all(call.kept is call.contribute is None for call in calls)


def tensors_there() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("options", [{"total": True}, {"direction": "total"}, {"weight_gradients": True}], ids=str)
def test_nothing_stays_behind(options):
    """Python does not see through every hook of a tensor: what lies in a circle with one would pile up, run by run."""
    cases = [(randomised(make()), randn(*shape, seed=1)) for make, shape in CASES.values()]
    cases += [(randomised_shared(Checkpointed(reentrant)), randn(B, 3, 5)) for reentrant in (True, False)]
    cases += [(randomised(Free()), randn(B, 3, 4)), (randomised(Gate()), randn(B, 3, 5))]

    def run() -> None:
        for model, x in cases:
            with per_sample_gradients(model, fallback="vmap", **options) as grads:
                losses_of(model, x).sum().backward()
            assert len(grads.sqnorm) == len(x)
            model.zero_grad()
            with pytest.raises(ZeroDivisionError), per_sample_gradients(model, fallback="vmap", **options):
                raise ZeroDivisionError(losses_of(model, x).sum())

    run()
    before = tensors_there()
    run()
    assert tensors_there() == before


def test_keyword_calls_and_other_peoples_hooks():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.linear.register_forward_hook(lambda module, args, output: output * 2)
            self.linear.register_forward_pre_hook(
                lambda module, args, kw: ((), {"input": kw["input"] + 1}), with_kwargs=True
            )

        def forward(self, x):
            return self.linear(input=x)

    check(randomised(Keyword()), randn(B, 5, seed=1))


def tied(*layers: nn.Module) -> nn.Module:
    """All layers use the weight of the first one."""
    model = nn.Sequential(*layers)
    for layer in layers[1:]:
        if getattr(layer, "weight", None) is not None:
            layer.weight = layers[0].weight
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_a_table_tied_to_a_decoder_has_an_exact_cross_term(bias):
    model = randomised_shared(tied(nn.Embedding(6, 5, padding_idx=2), nn.Tanh(), nn.Linear(5, 6, bias=bias)))
    check(model, torch.tensor([[1, 1, 1, 2], [0, 1, 2, 3], [5, 5, 0, 0], [2, 2, 2, 4]]))
    check(model, torch.tensor([[1, 1], [1, 2], [0, 1], [2, 3], [5, 5], [0, 0]]), rows_per_sample=2)


def test_weights_shared_between_kinds_are_summed_before_the_norm():
    """A matrix used as a linear layer's, transposed, sliced, as a table, as a convolution and element by element."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(6, 4))

        def forward(self, x):
            y = F.linear(x, self.weight).tanh() @ self.weight
            y = y + F.linear(x, self.weight[2:6]) + F.embedding(x[..., 0].abs().long() % 6, self.weight)
            y = y * self.weight[1] + (x @ self.weight.t()[:, :4]).tanh()
            return y + F.conv1d(y.mT, self.weight[:4].unsqueeze(-1)).mT / self.weight[5] + self.weight.exp().mean()

    check(randomised(Model()), randn(B, 3, 4, seed=1), float32=2e-5)  # float32 autograd itself is off by 6e-6


def test_half_shared_layers():
    half = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    half[2].weight = half[0].weight
    check(randomised_shared(half), randn(B, 2, 4, seed=1))


class Free(nn.Module):
    """Parameters of its own, as vision transformers have them."""

    def __init__(self, tokens=3, features=4):
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.cls, self.mask = (nn.Parameter(torch.zeros(1, 1, features)) for _ in range(2))
        self.register = nn.Parameter(torch.zeros(features))
        self.positions = nn.Embedding(tokens + 3, features)
        self.table = nn.Parameter(torch.zeros(1, tokens + 3, features))
        self.scale, self.temperature = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(()))
        self.queries = nn.Parameter(torch.zeros(1, 2, features))
        self.query = nn.Linear(features, features)

    def forward(self, x):
        masked = x[..., :1] > 0
        x = self.inner(torch.where(masked, self.mask.to(x.dtype), x))
        extra = self.register.expand(len(x), 1, -1)
        x = torch.cat((self.cls.expand(len(x), -1, -1), extra, self.mask.repeat(len(x), 1, 1), x), dim=1)
        x = x + self.positions(torch.arange(x.shape[1])) + self.table[:, : x.shape[1]]
        x = 1.5 - x * self.scale * self.temperature.exp()
        query = self.query(self.queries.expand(len(x), -1, -1))
        return x.sum(dim=1, keepdim=True) + F.scaled_dot_product_attention(query, x, x)


@pytest.mark.parametrize("tokens", [1, 2, B, 5])  # B + 3 positions, and as many tokens as samples, among them
def test_free_parameters_of_every_kind(tokens):
    check(randomised(Free(tokens)), randn(B, tokens, 4, seed=1), float32=1e-4)  # the softmax cancels
    check(randomised(Free(tokens)), randn(6, tokens, 4, seed=1), rows_per_sample=2, float32=1e-4)


def test_a_table_of_as_many_rows_as_samples_is_no_batch():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inner = nn.Embedding(B, 5), nn.Linear(5, 5)
            self.register_buffer("waves", randn(B, 5, seed=3))

        def forward(self, x):
            places = torch.arange(x.shape[1])
            return x * self.inner(self.table(places)).tanh() + self.inner(self.waves)

    check(randomised(Positions()), randn(B, B, 5, seed=1))


@pytest.mark.parametrize("name", LOOKED_UP)
@pytest.mark.parametrize("rows_per_sample", [1, 2])
def test_rows_of_a_table_by_the_numbers_of_samples(name, rows_per_sample):
    shape, look_up = LOOKED_UP[name]
    x = torch.tensor([[0, 1, 1], [3, 3, 3], [2, 0, 1], [1, 3, 0]])
    check(randomised(Picking(*shape, look_up=look_up)), x, rows_per_sample)


def test_a_row_that_is_not_in_the_table_is_an_index_error():
    model = Picking(B, 3, look_up=lambda table, x: table[x])
    with pytest.raises(IndexError, match="out of bounds"), per_sample_gradients(model):
        model(torch.tensor([[0], [B]]))


@pytest.mark.parametrize("name", QUERIES)
@pytest.mark.parametrize("tokens", [B, 5])
def test_learned_queries_keys_and_values(name, tokens):
    check(randomised(Queries(QUERIES[name])), randn(B, tokens, 6, seed=1))


@pytest.mark.parametrize("through", ["distances", "nearest"])
def test_distances_to_a_codebook(through):
    class Codebook(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.codes = nn.Linear(5, 3), nn.Embedding(6, 3)

        def forward(self, x):
            z = self.encode(x)
            distances = torch.cdist(z.flatten(0, 1), self.codes.weight)
            codes = self.codes(distances.argmin(dim=1)).view(z.shape)
            if through == "nearest":
                return z * codes
            return torch.cat((z + codes, distances.view(*x.shape[:2], -1)), dim=2)

    check(randomised(Codebook()), randn(B, 7, 5, seed=1), float32=2e-5)
    check(randomised(Codebook()), randn(6, 7, 5, seed=1), rows_per_sample=2, float32=2e-5)


@pytest.mark.parametrize("pick", PICKED)
@pytest.mark.parametrize("tokens", [1, 3])
def test_samples_that_change_places_are_refused(pick, tokens):
    """As a mixture of experts has them: rows would go to other samples."""

    class Dispatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x):
            x = self.first(x)
            rows = x.flatten(0, 1) if x.dim() == 3 else x
            return self.second(PICKED[pick](rows)).view(*x.shape[:-1], 3)

    model = Dispatch()
    x = randn(*((B, tokens, 5) if tokens > 1 else (B, 5)), seed=1).float()
    with pytest.raises(InputError, match="parameter second"), per_sample_gradients(model) as grads:
        model(x).flatten(1).square().sum(dim=1).sum().backward()
    with per_sample_gradients(model.first) as grads:
        model.first(x).flatten(1).sum(dim=1).sum().backward()
    assert grads.sqnorm.shape == (B,)


def test_a_batch_taken_apart_is_refused_by_name():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3)

        def forward(self, x):
            return torch.stack([self.linear(row) for row in x.unbind(0)])

    model = Apart()
    with pytest.raises(InputError, match="parameter linear"), per_sample_gradients(model):
        model(randn(B, B, 5, seed=1).float())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [3, B])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"kdim": 3, "vdim": 3}, {"bias": False}])
def test_multihead_attention(batch_first, length, options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)

        def forward(self, x):
            key = torch.cat((x, x.sin()), dim=1)[..., : options.get("kdim", 4)]
            x, key = (x, key) if batch_first else (x.transpose(0, 1), key.transpose(0, 1))
            y = self.attention(x, key, key)[0]
            return y if batch_first else y.transpose(0, 1)

    check(randomised(Model()), randn(B, length, 4, seed=1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_a_transformer_encoder_of_pytorch(batch_first, train):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first)

        def forward(self, x):
            return self.layer(x) if batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)

    check(randomised(Model()).train(train), randn(B, B, 4, seed=1))


def test_batch_norm_in_eval_mode_is_a_scale_and_a_shift():
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True))).eval()
    model[1].running_mean.copy_(randn(3, seed=1))
    model[1].running_var.copy_(randn(3, seed=2).exp())
    check(model, randn(B, 2, 4, 5, seed=3))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_in_training_mode_is_refused(affine):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=affine))
    with pytest.raises(InputError, match="BatchNorm with the statistics of the batch"), per_sample_gradients(model):
        model(torch.ones(3, 2))
    assert isinstance(model[0].weight, nn.Parameter)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.block = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5))
        self.block[3].weight = self.block[0].weight
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.block, self.first(x), use_reentrant=self.reentrant)
        return checkpoint(self.block, x, use_reentrant=self.reentrant) + x


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks(reentrant):
    plain, model = (randomised_shared(Checkpointed(reentrant)) for _ in range(2))
    x = randn(B, 3, 5, seed=1)
    gradients = []
    for row in x.split(1):
        plain.zero_grad()
        losses_of(plain, row).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in plain.parameters()]))
    with per_sample_gradients(model, total=True) as grads:
        losses_of(model, x).sum().backward()
    assert torch.allclose(grads.sqnorm, torch.stack([g.square().sum() for g in gradients]), rtol=1e-12)
    total = torch.cat([value.flatten() for value in grads.total.values()])
    assert torch.allclose(total, sum(gradients), rtol=1e-12)


def test_autocast_sees_what_the_layers_saw():
    model = randomised(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4), nn.Conv1d(3, 2, 1))).float()
    x = randn(B, 3, 8, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = sample_gradients(losses_of, model, list(x.split(1)))
        with per_sample_gradients(model, direction=gradients[0]) as grads:
            losses_of(model, x).sum().backward()
    expected = torch.stack([sum(g.double().square().sum() for g in row.values()) for row in gradients])
    assert torch.allclose(grads.sqnorm, expected, rtol=2e-2)  # autograd rounds each weight gradient to bfloat16
    assert torch.allclose(grads.dot[0], expected[0], rtol=2e-2)


def test_a_model_in_bfloat16():
    model = randomised(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))).bfloat16()
    x = randn(B, 3, 8, seed=1).bfloat16()
    gradients = sample_gradients(losses_of, model, list(x.split(1)))
    with per_sample_gradients(model) as grads:
        losses_of(model, x).sum().backward()
    expected = torch.stack([sum(g.double().square().sum() for g in row.values()) for row in gradients])
    assert torch.allclose(grads.sqnorm, expected, rtol=3e-2)


def test_one_sample_that_is_not_finite_leaves_the_others_as_they_are():
    model, x = randomised(nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))), randn(B, 2, 5, seed=1)
    with per_sample_gradients(model) as good:
        losses_of(model, x).sum().backward()
    x[1] = torch.nan
    with per_sample_gradients(model) as bad:
        losses_of(model, x).sum().backward()
    others = [0, 2, 3]
    assert bad.sqnorm[1].isnan() and torch.equal(bad.sqnorm[others], good.sqnorm[others])


def test_a_compiled_model_runs_as_before_it_was_compiled():
    model, x = randomised(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))), randn(B, 5, seed=1)
    with per_sample_gradients(model) as expected:
        losses_of(model, x).sum().backward()
    compiled = torch.compile(model, backend="eager")
    with per_sample_gradients(compiled) as grads:
        losses_of(compiled, x).sum().backward()
    assert torch.equal(grads.sqnorm, expected.sqnorm)


class Gate(nn.Module):
    """A function without a rule."""

    def __init__(self):
        super().__init__()
        self.inner, self.floor = nn.Linear(5, 5), nn.Parameter(torch.zeros(3, 5))

    def forward(self, x):
        return torch.maximum(self.inner(x), self.floor)


def test_a_function_without_a_rule_is_refused_by_name_or_mapped():
    model, x = randomised(Gate()), randn(B, 3, 5, seed=1)
    message = r"parameter floor: no per-sample gradient rule for maximum.*fallback='vmap'"
    with pytest.raises(InputError, match=message), per_sample_gradients(model):
        model(x)
    gradients = sample_gradients(losses_of, model, list(x.split(1)))
    expected = torch.stack([sum(g.square().sum() for g in row.values()) for row in gradients])
    parameters = list(model.parameters())
    with per_sample_gradients(model, fallback="vmap", weight_gradients=True) as grads:
        losses_of(model, x).sum().backward()
    assert torch.allclose(grads.sqnorm, expected, rtol=1e-12)
    for i, parameter in enumerate(parameters):
        assert torch.allclose(parameter.grad, sum(list(row.values())[i] for row in gradients), rtol=1e-12)
    with pytest.raises(InputError, match="expected fallback None or 'vmap'"), per_sample_gradients(model, fallback="x"):
        pytest.fail("entered")


def test_a_use_that_a_rule_does_not_cover_is_refused_by_name_or_mapped():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.Parameter(torch.zeros(2, 5, 3))

        def forward(self, x):
            return x[:, None] @ self.heads  # [B, 2, T, 3]

    model, x = randomised(Heads()), randn(B, 4, 5, seed=1)
    message = "parameter heads: no per-sample gradient rule for this use in matmul"
    with pytest.raises(InputError, match=message), per_sample_gradients(model):
        model(x)
    gradients = sample_gradients(losses_of, model, list(x.split(1)))
    with per_sample_gradients(model, fallback="vmap", total=True) as grads:
        losses_of(model, x).sum().backward()
    expected = torch.stack([row["heads"].square().sum() for row in gradients])
    assert torch.allclose(grads.sqnorm, expected, rtol=1e-12)
    assert torch.allclose(grads.total["heads"], sum(row["heads"] for row in gradients), rtol=1e-12)


def test_recurrent_weights_are_refused_by_name():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 4, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    with (
        pytest.raises(InputError, match=r"rnn\.weight_ih_l0: no per-sample .* gru"),
        per_sample_gradients(model := Model()),
    ):
        model(torch.ones(2, 3, 4)).sum().backward()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter; its parameters are float32"),
        (
            nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))]),
            "parameter 0: expected float16.*complex64",
        ),
        (nn.Linear(2, 2).to(torch.float8_e4m3fn), "parameter weight: expected float16.*float8_e4m3fn"),
        (nn.Sequential(), "Sequential: no trainable parameter; its parameters are none"),
    ],
)
def test_what_has_no_gradient_is_refused_by_name(model, message):
    with pytest.raises(InputError, match=message), per_sample_gradients(model):
        pytest.fail("entered")


@pytest.mark.parametrize(
    ("options", "message"), [({"max_norm": 1.0}, "max_norm=None"), ({"scale_grad_by_freq": True}, "scale_grad_by_freq")]
)
def test_options_that_mix_samples_are_refused(options, message):
    model = nn.Embedding(3, 3, **options)
    before = model.weight.detach().clone()
    with pytest.raises(InputError, match=message), per_sample_gradients(model):
        model(torch.tensor([0, 1]))
    assert torch.equal(model.weight, before)


def test_functional_use_of_a_weight_counts():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.inner(x), self.outer.weight)

    check(randomised(Functional()), randn(B, 2, 4, seed=1))


@pytest.mark.parametrize("where", ["loss", "reference", "function"])
def test_a_gradient_past_all_rules_is_refused_by_name(where):
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x * weight

        @staticmethod
        def backward(ctx, gradient):
            return gradient, (gradient * ctx.saved_tensors[0]).sum(dim=0)

    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    taken = linear.bias
    ways = {
        "loss": (lambda: linear(x).sum() + linear.bias.square().sum(), "parameter bias.*batch first"),
        "reference": (lambda: (linear(x) * taken).sum(), "parameter bias: used past its module"),
        "function": (lambda: Hidden.apply(linear(x), linear.bias).sum(), "parameter bias: has a gradient that no rule"),
    }
    run, message = ways[where]
    with pytest.raises(InputError, match=message), per_sample_gradients(linear):
        run().backward()


def test_an_input_changed_in_place_is_refused():
    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    with (
        pytest.raises(InputError, match="parameter bias, weight: what it met was changed in place"),
        per_sample_gradients(linear),
    ):
        y = linear(x)
        x.add_(1)
        y.sum().backward()


def test_rows_that_do_not_fit_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for shape in ((5, 4), (1, 4), (4,)):  # not a row for each of the 3 samples: nobody's gradient
        with pytest.raises(InputError, match=r"parameter 0\.bias, .*3 rows"), per_sample_gradients(model):
            (model(torch.ones(3, 4)).sum() + model(torch.ones(*shape)).sum()).backward()
    with pytest.raises(InputError, match=r"batch first.*got \(4,\)"), per_sample_gradients(model):
        model(torch.ones(4))
    with pytest.raises(InputError, match="a multiple of 2 rows, got 3"), per_sample_gradients(model, rows_per_sample=2):
        model(torch.ones(3, 4))


def test_forwards_and_backwards_that_do_not_fit_are_refused():
    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(InputError, match="expected a forward and a backward"), per_sample_gradients(linear):
        loss = linear(x).sum()
    with pytest.raises(InputError, match="expected one forward, then one backward, in the block"):
        loss.backward()
    with pytest.raises(InputError, match="expected one forward, then one"), per_sample_gradients(linear):
        linear(x).sum().backward()
        linear(x).sum().backward()
    with pytest.raises(InputError, match="expected one forward, then one backward"), per_sample_gradients(linear):
        loss = linear(x).sum()
        loss.backward(retain_graph=True)
        loss.backward()


def test_directions_that_do_not_fit_are_refused():
    linear = nn.Linear(4, 3)
    good = {"weight": torch.ones(3, 4), "bias": torch.ones(3)}
    bad = [
        ({"weight": good["weight"]}, r"expected bias \(3,\), got none"),
        ({**good, "weight": torch.ones(4, 3)}, r"expected weight \(3, 4\), got \(4, 3\)"),
        ({**good, "other": torch.ones(3)}, "other is no trainable parameter"),
    ]
    for direction, message in bad:
        with pytest.raises(InputError, match=message), per_sample_gradients(linear, direction=direction):
            pytest.fail("entered")


def test_what_was_not_asked_for_is_refused():
    linear, x = nn.Linear(4, 3), torch.ones(2, 4)
    with pytest.raises(InputError, match="nothing to compute"), per_sample_gradients(linear, norm=False):
        pytest.fail("entered")
    with pytest.raises(InputError, match="rows_per_sample >= 1"), per_sample_gradients(linear, rows_per_sample=0):
        pytest.fail("entered")
    direction = {name: torch.ones_like(p) for name, p in linear.named_parameters()}
    with per_sample_gradients(linear, norm=False, direction=direction) as grads:
        linear(x).sum().backward()
    assert grads.dot.tolist() == [4 * 3 + 3] * 2
    with pytest.raises(InputError, match="norm=False"):
        _ = grads.sqnorm
    with per_sample_gradients(linear) as grads:
        linear(x).sum().backward()
    with pytest.raises(InputError, match="direction=None"):
        _ = grads.dot
    with pytest.raises(InputError, match="total=False"):
        _ = grads.total


@pytest.mark.parametrize("where", ["before", "forward", "backward"])
def test_the_model_is_as_before_after_an_error(where):
    model = nn.Sequential(nn.Linear(4, 4), Lambda(lambda x: x), nn.Linear(4, 3))
    parameters = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), per_sample_gradients(model):
        if where == "before":
            raise ZeroDivisionError
        if where == "forward":
            model[2].register_forward_pre_hook(lambda *_: 1 / 0)
        y = model(torch.ones(2, 4))
        y.register_hook(lambda _: 1 / 0)
        y.sum().backward()
    assert all(model.get_parameter(name) is value for name, value in parameters.items())
    model[2]._forward_pre_hooks.clear()
    model(torch.ones(2, 4)).sum().backward()  # no hook of ours is left to object
    assert all(p.grad is not None for p in model.parameters())


def test_the_pages_examples_run():
    page = Path(__file__).parents[1] / "docs" / "per_sample.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 4
    names, sqnorms = {}, []
    known = dict(gradient_rules.RULES)
    try:
        for block in blocks:
            exec(compile(block, str(page), "exec"), names)
            sqnorms.append(names["grads"].sqnorm)
        assert torch.maximum in gradient_rules.RULES
        assert torch.allclose(sqnorms[3], sqnorms[2], rtol=1e-6)  # the page's rule equals the fallback
    finally:
        gradient_rules.RULES.clear()
        gradient_rules.RULES.update(known)

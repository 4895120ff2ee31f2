"""Per-sample norms and dots against float64 autograd, one sample at a time, for every rule and every odd use."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients
from diffprune.weight_tensors import _Call

B = 4


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomised(model: nn.Module) -> nn.Module:
    """All weights nonzero, float64."""
    model = model.double()
    for seed, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=100 + seed) * 0.3
    return model


def sample_gradients(model: nn.Module, rows: list) -> list[dict[str, torch.Tensor]]:
    """The definition: torch.autograd.grad of one sample's loss over all trainable parameters, for each sample."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    result = []
    for row in rows:
        gradients = torch.autograd.grad(losses_of(model, row).sum(), parameters, allow_unused=True)
        zeros = (torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True))
        result.append(dict(zip(names, zeros, strict=True)))
    return result


def losses_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    weights = torch.linspace(-1, 2, y[0].numel(), dtype=y.dtype).view(y.shape[1:])
    return (weights * y.sin()).flatten(1).sum(dim=1)  # a loss that no two output elements share


def check(model: nn.Module, x: torch.Tensor, rows_per_sample: int = 1) -> None:
    """Norms, their parts and dots of a float64 model, and in float32, too."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = sample_gradients(model, list(x.split(rows_per_sample)))
    direction = {name: randn(*gradients[0][name].shape, seed=7) for name in names}
    sqnorm = torch.stack([sum(g.square().sum() for g in row.values()) for row in gradients])
    dot = torch.stack([sum((row[name] * direction[name]).sum() for name in names) for row in gradients])
    size = sqnorm.sqrt() * sum(d.square().sum() for d in direction.values()).sqrt()  # dots may cancel
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
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


@pytest.mark.parametrize("name", CASES)
def test_rules_equal_float64_autograd(name):
    make, shape = CASES[name]
    check(randomised(make()), randn(*shape, seed=1))


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
    with per_sample_gradients(hooked, weight_gradients=True) as grads:
        losses_of(hooked, x).sum().backward()
        for a, b in zip(plain.parameters(), hooked.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-14, atol=1e-14)
    reference = sample_gradients(plain, list(x.split(1)))
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
    reference = sample_gradients(model, list(x.split(1)))
    assert torch.allclose(inside, torch.stack([sum(g.square().sum() for g in r.values()) for r in reference]))


def test_what_a_layer_saw_is_let_go_once_its_sums_are_made():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with per_sample_gradients(model):
        loss = model(torch.ones(3, 4)).sum()  # keeps the graph, and with it its hooks
        loss.backward()
        calls = [thing for thing in gc.get_objects() if type(thing) is _Call]
        assert len(calls) == 2 and all(call.input is call.gradient is None for call in calls)


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


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 1)), r"parameter 0\.weight: no per-sample gradient rule.*Conv1d"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"parameter 1\.weight: .*BatchNorm1d"),
        (nn.MultiheadAttention(4, 2), r"parameter in_proj_weight: .*MultiheadAttention"),
        (nn.Conv2d(4, 4, 1, groups=2), "expected groups=1"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding="same")), r"layer 0 \(Conv2d\): expected groups=1"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "zero padding"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm=None"),
        (nn.Linear(2, 2).requires_grad_(False), "no trainable parameter"),
    ],
)
def test_what_no_rule_covers_is_refused_by_name(model, message):
    with pytest.raises(InputError, match=message), per_sample_gradients(model):
        pytest.fail("entered")


def test_a_bare_parameter_is_refused_by_name_unless_frozen():
    model = nn.Sequential(nn.Linear(2, 2))
    model.position = nn.Parameter(torch.zeros(2))
    with pytest.raises(InputError, match="parameter position"), per_sample_gradients(model):
        pytest.fail("entered")
    model.position.requires_grad_(False)
    with per_sample_gradients(model):
        model(torch.ones(3, 2)).sum().backward()


def test_partly_shared_parameters_are_refused_by_name():
    tied = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    tied[1].weight = tied[0].weight
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    half[1].weight = half[0].weight
    for model in (tied, half):
        message = r"layer 1 \(Linear\) shares a parameter with layer 0"
        with pytest.raises(InputError, match=message), per_sample_gradients(model):
            pytest.fail("entered")


def test_a_parameter_used_outside_of_its_layer_is_refused():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return F.linear(self.inner(x), self.outer.weight)

    model = Functional()
    with pytest.raises(InputError, match=r"parameter outer\.weight: used outside"), per_sample_gradients(model):
        model(torch.ones(2, 4)).sum().backward()
    linear = nn.Linear(4, 4)
    with pytest.raises(InputError, match="parameter bias: used outside"), per_sample_gradients(linear):
        (linear(torch.ones(2, 4)).sum() + linear.bias.square().sum()).backward()


def test_an_input_changed_in_place_is_refused():
    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(InputError, match=r"\(Linear\): its input was changed in place"), per_sample_gradients(linear):
        y = linear(x)
        x.add_(1)
        y.sum().backward()


def test_rows_that_do_not_fit_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    for shape in ((5, 4), (1, 4), (4,)):
        with pytest.raises(InputError, match=r"layer 0 .*batch first, 3 rows"), per_sample_gradients(model):
            model(torch.ones(3, 4))
            model(torch.ones(*shape))
    with pytest.raises(InputError, match=r"batch first, .*got \(4,\)"), per_sample_gradients(model):
        model(torch.ones(4))
    with pytest.raises(InputError, match="a multiple of 2 rows, got 3"), per_sample_gradients(model, rows_per_sample=2):
        model(torch.ones(3, 4))


def test_forwards_and_backwards_that_do_not_fit_are_refused():
    linear, x = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(InputError, match="expected a forward and a backward"), per_sample_gradients(linear):
        loss = linear(x).sum()
    with pytest.raises(InputError, match="expected one backward, in the block"):
        loss.backward()
    with pytest.raises(InputError, match="ran again after its backward"), per_sample_gradients(linear):
        linear(x).sum().backward()
        linear(x)
    with pytest.raises(InputError, match="expected one backward"), per_sample_gradients(linear):
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

"""Per-sample gradients where a user asks more of autograd in the block: hooks, gradients of gradients, tangents."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from model_gradients import check, drawn_anew, sample_gradients
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from diffprune.errors import InputError
from diffprune.per_sample import per_sample_gradients

B, D = 3, 6


def inputs(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Hooked(nn.Module):
    """`hook` gets what each layer returns."""

    def __init__(self, hook) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, 4)
        self.scale, self.hook = nn.Parameter(torch.zeros(D)), hook

    def forward(self, x):
        y = self.first(x)
        self.hook(y)
        y = y.tanh() * self.scale
        self.hook(y)
        y = self.second(y.relu_() if self.hook is halve else y)
        self.hook(y)
        return y


def losses_of(model, x):
    return model(x).sin().flatten(1).sum(1)


def halve(tensor):
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * 0.5)


def retain(tensor):
    if tensor.requires_grad:
        tensor.retain_grad()


@pytest.mark.parametrize("hook", [halve, retain], ids=["halve", "retain"])
@pytest.mark.parametrize("checkpointed", [None, True, False])
def test_hooks_on_what_a_layer_returns_change_its_gradient(hook, checkpointed):
    model, x = drawn_anew(Hooked(hook)), inputs(B, 2, D)

    def losses(model, x):
        if checkpointed is None:
            return losses_of(model, x)
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=checkpointed).sin().flatten(1).sum(1)

    check(losses, model, x, sample_gradients(losses_of, model, x.split(1)))


@pytest.mark.parametrize("hook", [halve, retain], ids=["halve", "retain"])
def test_hooks_where_weights_are_mapped(hook):
    class Mapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.floor = nn.Parameter(torch.zeros(D))

        def forward(self, x):
            y = torch.maximum(x, self.floor)
            hook(y)
            return y

    model, x = drawn_anew(Mapped()), inputs(B, 2, D)
    gradients = sample_gradients(losses_of, model, x.split(1))
    with per_sample_gradients(model, fallback="vmap") as grads:
        losses_of(model, x).sum().backward()
    assert torch.allclose(grads.sqnorm, torch.stack([row["floor"].square().sum() for row in gradients]), rtol=1e-12)


def in_place(operate, grown):
    """`operate(part, weight)` on a part of x or of what a layer returned, without taking its result."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(D, D), nn.Parameter(torch.zeros(D))

        def forward(self, x):
            y = self.layer(x) if grown else x * 1
            operate(y, self.scale)
            return y.tanh() if grown else self.layer(y)

    return Model()


@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize(
    "operate",
    [
        lambda y, w: y.add_(w),
        lambda y, w: y.mul_(w).sub_(w),
        lambda y, w: y[:, 1:].mul_(w),
        lambda y, w: y[:, 0, 1:].add_(w[1:]),
        lambda y, w: y.transpose(0, 1)[1:].div_(w),
        lambda y, w: y.mul_(w)[:, 1:].sub_(w),
    ],
    ids=["all", "twice", "a part", "a part of a part", "transposed", "all, then a part"],
)
def test_a_weight_that_enters_in_place_counts(operate, grown):
    model, x = drawn_anew(in_place(operate, grown)), inputs(B, 2, D)
    check(losses_of, model, x, sample_gradients(losses_of, model, x.split(1)))
    with per_sample_gradients(model, weight_gradients=True):
        losses_of(model, x).sum().backward()
    expected = torch.autograd.grad(losses_of(model, x).sum(), list(model.parameters()))
    assert all(torch.allclose(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_where_tokens_are_as_many_as_samples(reentrant):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.table = nn.Linear(D, D), nn.Linear(D, D), nn.Embedding(B, D)

        def forward(self, x, options):
            x = checkpoint(self.first, x.clone().requires_grad_(), **options).transpose(0, 1)
            nested = checkpoint if options["use_reentrant"] else lambda f, y, **_: f(y)  # else it is refused
            x = checkpoint(lambda y: nested(self.second, y.tanh(), **options).cos() * y, x, **options)
            return checkpoint(lambda y, i: y * self.table(i), x.transpose(0, 1), torch.arange(B), **options)

    model, x = drawn_anew(Model()), inputs(B, B, D)
    rows = sample_gradients(lambda m, x: m(x, {"use_reentrant": False}).sin().flatten(1).sum(1), model, x.split(1))
    check(lambda m, x: m(x, {"use_reentrant": reentrant}).sin().flatten(1).sum(1), model, x, rows)


def penalty(model, x, **options):
    z = x.clone().requires_grad_()
    [gradient] = torch.autograd.grad(model(z).sum(), z, **options)
    return gradient.square().flatten(1).sum(1)


ORDERS = {
    "a penalty after the loss": lambda m, x: model_loss(m, x) + penalty(m, x, create_graph=True),
    "a penalty before the loss": lambda m, x: penalty(m, x, create_graph=True) + model_loss(m, x),
    "a penalty alone": lambda m, x: penalty(m, x, create_graph=True),
    "a gradient without a graph": lambda m, x: penalty(m, x, retain_graph=True) * model_loss(m, x),
    "of the parameters": lambda m, x: torch.autograd.grad(model_loss(m, x).sum(), list(m.parameters()))[0].sum() * x,
    "of parameters that were taken": lambda m, x: m.taken(model_loss(m, x).sum()) * x,
    "a hessian": lambda m, x: torch.autograd.functional.hessian(lambda z: model_loss(m, z).sum(), x).sum() * x,
}


def model_loss(model, x):
    return model(x).square().flatten(1).sum(1)


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_within_the_block_are_refused(name, layers):
    model, x = nn.Sequential(*[nn.Linear(D, D), nn.Tanh()][: 2 * layers - 1], nn.Linear(D, D)), inputs(B, D).float()
    parameters = list(model.parameters())
    model.taken = lambda loss: torch.autograd.grad(loss, parameters, allow_unused=True)[0]
    with pytest.raises(InputError, match=r"parameter .*torch\.autograd\.grad"), per_sample_gradients(model):
        ORDERS[name](model, x).sum().backward()
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_a_gradient_of_another_model_is_none_of_ours():
    model, energy, x = drawn_anew(nn.Linear(D, D)), drawn_anew(nn.Linear(D, 1)), inputs(B, D)

    def losses(model, x):
        z = x.clone().requires_grad_()
        [force] = torch.autograd.grad(energy(z).tanh().sum(), z)
        return losses_of(model, x + force)

    check(losses, model, x, sample_gradients(losses, model, x.split(1)))


@pytest.mark.parametrize("where", ["inside", "before"])
def test_tangents_are_refused(where):
    model, x = nn.Linear(D, D), inputs(B, D).float()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(InputError, match="forward-mode"), per_sample_gradients(model):
            if where == "inside":
                dual = forward_ad.make_dual(x, torch.ones_like(x))
            model(dual).square().sum().backward()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: torch.func.jvp(m, (x,), (x,))[1],
        lambda m, x: torch.func.grad(lambda z: m(z).square().sum())(x),
        lambda m, x: torch.func.vmap(m)(x),
        lambda m, x: torch.func.vmap(torch.func.grad(lambda z: m(z).square().sum()))(x),
    ],
    ids=["jvp", "grad", "vmap", "both"],
)
def test_function_transforms_of_the_model_are_refused(run):
    model, x = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)), inputs(B, D).float()
    with pytest.raises(InputError, match=r"torch\.func|forward-mode"), per_sample_gradients(model):
        run(model, x).square().sum().backward()


def test_gradients_of_parameters_can_be_read_and_clipped_in_the_block():
    model, plain, x = (drawn_anew(nn.Linear(D, 3)) for _ in range(2)), None, inputs(B, D)
    model, plain = model
    losses_of(plain, x).sum().mul(100).backward()
    expected = clip_grad_norm_(plain.parameters(), 1.0)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    torch.optim.SGD(plain.parameters(), 1.0).step()
    with per_sample_gradients(model, weight_gradients=True):
        assert model.weight.grad is None
        losses_of(model, x).sum().mul(100).backward()
        assert torch.allclose(clip_grad_norm_(model.parameters(), 1.0), expected)
        assert torch.allclose(model.weight.grad, plain.weight.grad)
        optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b)
    with per_sample_gradients(model, weight_gradients=True):
        model.zero_grad()
        losses_of(model, x).sum().backward()
        once = model.weight.grad.clone()
        model.weight.grad = once * 2
        del model.bias.grad
    assert torch.equal(model.weight.grad, once * 2) and model.bias.grad is None
    with per_sample_gradients(model, weight_gradients=True):
        losses_of(model, x).sum().backward()
        model.zero_grad(set_to_none=False)
    assert torch.equal(model.weight.grad, torch.zeros(3, D))


def test_hooks_on_parameters_are_refused_in_the_block():
    model = nn.Linear(D, D)
    with pytest.raises(InputError, match="parameter weight: hooks"), per_sample_gradients(model):
        model.weight.register_hook(lambda gradient: gradient)


def test_options_that_say_nothing_are_taken():
    class Model(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.zeros(D)), out

        def forward(self, x):
            return torch.mul(x, self.scale, out=self.out)

    model, x = drawn_anew(Model(None)), inputs(B, D)
    check(losses_of, model, x, sample_gradients(losses_of, model, x.split(1)))
    with pytest.raises(InputError, match=r"parameter scale: .*out="), per_sample_gradients(model):
        torch.mul(x, model.scale, out=torch.empty(B, D))


def test_scripted_modules_are_refused_by_name():
    model = nn.Sequential(nn.Linear(D, D), torch.jit.script(nn.Linear(D, D)))
    with pytest.raises(InputError, match="1: is scripted"), per_sample_gradients(model):
        pytest.fail("entered")
    assert F.linear(inputs(B, D).float(), model[0].weight).shape == (B, D)


def test_sharded_parameters_are_refused_by_name():
    model = nn.Linear(D, D)
    model.bias.placements = ()  # as of a DTensor, which needs processes
    with pytest.raises(InputError, match="parameter bias: is a DTensor"), per_sample_gradients(model):
        pytest.fail("entered")

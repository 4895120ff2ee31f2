"""Every score against its definition: float64, one sample at a time, torch.autograd.grad over all parameters; and
MoSo against really leaving each sample out."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_draws import scalar_bits
from torch import Tensor, nn

from diffprune.draws import hash_keys
from diffprune.errors import InputError
from diffprune.memory import BatchSize
from diffprune.models.dit import DiT
from diffprune.per_sample import per_sample_gradients
from diffprune.scores.batches import Draws, Network, Samples, in_batches
from diffprune.scores.grand import GRAND
from diffprune.scores.loss import EL2N, LOSS
from diffprune.scores.monotonicity import MONOTONICITY, monotonicity
from diffprune.scores.moso import MODES, gradient_sum, moso, moso_field
from diffprune.scores.random import RANDOM, random_scores
from diffprune.scores.visit import visit

N, CLASSES = 11, 5


def small_dit(num_classes: int, seed: int = 1, scale: float = 0.02, depth: int = 2) -> DiT:
    """A DiT with no zero weight: as initialised, adaLN-Zero would hide most of its parameters from the gradient."""
    model = DiT(
        input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=depth, num_heads=2, num_classes=num_classes
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval()


def small_set(num_classes: int, seed: int = 1) -> tuple[list[str], Samples]:
    generator = torch.Generator().manual_seed(seed)
    keys = [f"{i // 4:03d}/{i}" for i in range(N)]
    latents = torch.randn(N, 4, 8, 8, generator=generator)
    labels = torch.randint(0, num_classes, (N,), generator=generator) if num_classes else None
    return keys, Samples(hash_keys(keys), latents, labels)


@dataclass
class Reference:
    """The definitions of each sample, in float64."""

    loss: Tensor  # [N]
    el2n: Tensor
    grand: Tensor
    gradients: Tensor  # [N, P], of the mean loss over draws


def philox_draw(seed: int, key: str, draw: int, draws: int, shape: tuple[int, ...]) -> tuple[float, np.ndarray]:
    """The draw of a key (t, x0) by the scalar re-implementation that test_draws checks the generator with."""
    a, b = scalar_bits(seed, key, "time", draw, 0)[:2]
    t = float(np.float32((draw % draws + ((a << 21) | (b >> 11)) / 2**53) / draws))
    noise = []
    for block in range(math.prod(shape) // 4):
        words = scalar_bits(seed, key, "noise", draw, block)
        for u, w in (words[:2], words[2:]):
            radius, angle = math.sqrt(-2 * math.log((u + 1) / 2**32)), 2 * math.pi * w / 2**32
            noise += [radius * math.cos(angle), radius * math.sin(angle)]
    return t, np.float32(noise).reshape(shape).astype(np.float64)


def reference(model: DiT, keys: list[str], samples: Samples, seed: int, draws: int) -> Reference:
    model = copy.deepcopy(model).double()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss, el2n, grand, gradients = torch.zeros(N), torch.zeros(N), torch.zeros(N), []
    loss, el2n, grand = loss.double(), el2n.double(), grand.double()
    for i, key in enumerate(keys):
        mean = 0
        for draw in range(draws):
            t, noise = philox_draw(seed, key, draw, draws, (4, 8, 8))
            x1, x0 = samples.latents[i : i + 1].double(), torch.from_numpy(noise)[None]
            label = None if samples.labels is None else samples.labels[i : i + 1]
            error = model(t * x1 + (1 - t) * x0, torch.tensor([t]).double(), label) - (x1 - x0)
            value = (error**2).sum() / error.numel()
            parts = torch.autograd.grad(value, parameters)
            gradient = torch.cat([part.flatten() for part in parts])
            assert all(part.abs().max() > 0 for part in parts if part.numel() > CLASSES * 32)
            loss[i] += value.item() / draws
            el2n[i] += (error**2).sum().sqrt().item() / draws
            grand[i] += (gradient**2).sum().sqrt() / draws
            mean = mean + gradient / draws
        gradients.append(mean)
    return Reference(loss, el2n, grand, torch.stack(gradients))


def relative(got: Tensor, expected: Tensor) -> float:
    assert got.dtype == torch.float64 and got.shape == expected.shape
    return ((got - expected) / expected).abs().max().item()


def moso_terms(model: nn.Module, samples: Samples, draws: Draws, batch_size: int) -> tuple[Tensor, Tensor, Tensor, int]:
    total, count = sums_of(model, samples, draws, batch_size)
    mean = {name: value / count for name, value in total.items()}
    dot, sqnorm = products_of(model, mean, samples, draws, batch_size)
    return dot, sum(value.square().sum() for value in mean.values()), sqnorm, count


def sums_of(model: nn.Module, samples: Samples, draws: Draws, batch_size: int) -> tuple[dict[str, Tensor], int]:
    found = gradient_sum(Network(model), samples, draws, BatchSize(batch_size))
    assert found.population == found.samples
    return found.sums, found.samples


def products_of(
    model: nn.Module, mean: dict[str, Tensor], samples: Samples, draws: Draws, batch_size: int
) -> tuple[Tensor, Tensor]:
    found = visit(Network(model), samples, draws, BatchSize(batch_size), direction=mean)
    return found["dot"], found["sqnorm"]


def scores_of(
    model: nn.Module, samples: Samples, draws: Draws, batch_size: int, norms: bool = True
) -> dict[str, Tensor]:
    found = visit(Network(model), samples, draws, BatchSize(batch_size), norms=norms)
    return {name: values.mean(dim=1) for name, values in found.items()}


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("num_classes", [CLASSES, 0])
def test_scores_equal_float64_autograd_one_sample_at_a_time(num_classes, draws):
    model, (keys, samples) = small_dit(num_classes), small_set(num_classes)
    expected = reference(model, keys, samples, 3, draws)
    got = scores_of(model, samples, Draws(3, draws), batch_size=4)
    for name in ("loss", "el2n", "grand"):
        assert relative(got[name], getattr(expected, name)) < 1e-5, name
    without = scores_of(model, samples, Draws(3, draws), batch_size=4, norms=False)
    assert set(without) == {"loss", "el2n"}
    for name in ("loss", "el2n"):
        assert relative(without[name], getattr(expected, name)) < 1e-5, name


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("num_classes", [CLASSES, 0])
def test_moso_equals_float64_autograd_one_sample_at_a_time(num_classes, draws):
    model, (keys, samples) = small_dit(num_classes), small_set(num_classes)
    gradients = reference(model, keys, samples, 3, draws).gradients
    mean = gradients.mean(dim=0)
    without = (N * mean - gradients) / (N - 1)
    total_steps, rate = 5000, 1e-4
    expected = {
        "paper": total_steps / N * rate * (without * gradients).sum(dim=1),
        "loo1": rate * (without * (mean - without)).sum(dim=1),
        "authors": (
            (2 * N - 3) * (mean * mean).sum()
            + (2 * N - 4) * (gradients @ mean)
            - (3 - 4 / N) * (gradients * gradients).sum(dim=1)
        )
        / (N - 1) ** 2,
    }
    dot, mean_sqnorm, sqnorm, count = moso_terms(model, samples, Draws(3, draws), batch_size=8)
    assert count == N and set(expected) == set(MODES)
    for mode, value in expected.items():
        got = moso(mode, N, total_steps, rate, dot, mean_sqnorm, sqnorm)
        assert relative(got, value) < 1e-5, mode


@pytest.mark.parametrize("seed", range(3))
def test_moso_loses_digits_only_where_its_terms_cancel(seed):
    """`loo1` is a difference of large terms and may be near 0 for some sample: against the size of its terms, float32
    gradients leave 6 digits at least."""
    model, (keys, samples) = small_dit(CLASSES, seed=10 + seed, scale=0.1), small_set(CLASSES, seed=20 + seed)
    gradients = reference(model, keys, samples, seed, 1).gradients
    mean = gradients.mean(dim=0)
    dot, mean_sqnorm, sqnorm, _ = moso_terms(model, samples, Draws(seed, 1), batch_size=4)
    norms = gradients.square().sum(dim=1)
    size = (N + 1) * norms.sqrt() * mean.norm() + N * mean.square().sum() + norms
    expected = (N + 1) * (gradients @ mean) - N * mean.square().sum() - norms
    got = moso("loo1", N, 1, 1.0, dot, mean_sqnorm, sqnorm) * (N - 1) ** 2
    assert ((got - expected).abs() / size).max() < 1e-6


def convex_problem(kind: str, n: int = 60, features: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    """A small convex model in float64 away from its optimum, inputs and targets."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(features, generator=generator, dtype=torch.float64)
    y = y + torch.randn(n, generator=generator, dtype=torch.float64)
    model = nn.Linear(features, 1).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, features, generator=generator, dtype=torch.float64) * 0.3)
        model.bias.fill_(0.2)
    return model, x, (y if kind == "linear" else (y > 0).double())


def convex_losses(kind: str, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    prediction = model(x)[:, 0]
    if kind == "linear":
        return (prediction - y).square()
    return nn.functional.binary_cross_entropy_with_logits(prediction, y, reduction="none")


def true_leave_one_out(kind: str, model: nn.Module, x: Tensor, y: Tensor, rate: float) -> Tensor:
    """For each sample: the loss of the others after one gradient step on the others, minus that after one step on
    all. Really trained twice per sample."""
    changes = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        after = []
        for rows in (others, torch.ones_like(others)):
            trained = copy.deepcopy(model)
            loss = convex_losses(kind, trained, x[rows], y[rows]).mean()
            for p, g in zip(trained.parameters(), torch.autograd.grad(loss, list(trained.parameters())), strict=True):
                p.data -= rate * g
            after.append(convex_losses(kind, trained, x[others], y[others]).mean().item())
        changes.append(after[0] - after[1])
    return torch.tensor(changes, dtype=torch.float64)


def convex_scores(kind: str, model: nn.Module, x: Tensor, y: Tensor, rate: float) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradient = torch.autograd.grad(convex_losses(kind, model, x, y).mean(), parameters)
    mean = dict(zip(names, gradient, strict=True))
    with per_sample_gradients(model, direction=mean) as grads:
        convex_losses(kind, model, x, y).sum().backward()
    mean_sqnorm = sum(value.square().sum() for value in mean.values())
    return {mode: moso(mode, len(x), 100, rate, grads.dot, mean_sqnorm, grads.sqnorm) for mode in MODES}


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_loo1_is_the_true_leave_one_out_change_and_authors_is_not(kind):
    model, x, y = convex_problem(kind)
    for _ in range(60):  # some way towards the optimum, where gradients disagree
        loss = convex_losses(kind, model, x, y).mean()
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= (0.025 if kind == "linear" else 0.3) * g
    errors = []
    for rate in (1e-2, 1e-3):
        truth = true_leave_one_out(kind, model, x, y, rate)
        scores = convex_scores(kind, model, x, y, rate)
        errors.append(((scores["loo1"] - truth).abs().max() / truth.abs().max()).item())
    assert errors[1] < 2e-3 and errors[0] / errors[1] == pytest.approx(10, rel=0.1)  # exact to first order in the rate
    assert (truth > 0).sum() > 5 and (truth < 0).sum() > 5  # so that a wrong sign cannot pass
    assert spearman(scores["loo1"], truth) > 0.9999
    assert spearman(scores["paper"], truth) > 0.995  # nearly the same order
    assert spearman(scores["authors"], truth) < 0.98
    assert (scores["authors"].sign() != truth.sign()).double().mean() > 0.15
    best_multiple = scores["authors"] * (truth @ scores["authors"]) / (scores["authors"] @ scores["authors"])
    assert (best_multiple - truth).abs().max() > 0.05 * truth.abs().max()


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = [values.argsort().argsort().double() for values in (a, b)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def test_moso_by_hand():
    """N=3, gradients 1, 2, 6 of one parameter: ḡ=3, and for g=6 h=1.5."""
    dot, sqnorm = torch.tensor([18.0]).double(), torch.tensor([36.0]).double()
    assert moso("paper", 3, 10, 0.5, dot, 9.0, sqnorm).item() == pytest.approx(10 / 3 * 0.5 * 1.5 * 6)
    assert moso("loo1", 3, 10, 0.5, dot, 9.0, sqnorm).item() == pytest.approx(0.5 * 1.5 * (3 - 1.5))
    assert moso("authors", 3, 10, 0.5, dot, 9.0, sqnorm).item() == pytest.approx((3 * 9 + 2 * 18 - 5 / 3 * 36) / 4)


def test_moso_refuses_what_has_no_meaning():
    one = torch.ones(1).double()
    with pytest.raises(InputError, match="at least 2 samples, got 1"):
        moso("paper", 1, 10, 0.1, one, 1.0, one)
    with pytest.raises(InputError, match="one of paper, loo1, authors, got 'exact'"):
        moso("exact", 5, 10, 0.1, one, 1.0, one)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding; to the bit where PyTorch's matrix products are MKL's."""
    return torch.equal(a, b) if torch.backends.mkl.is_available() else relative(a, b) < 1e-6


def test_a_score_does_not_depend_on_who_is_beside_it():
    model, (_, samples) = small_dit(CLASSES), small_set(CLASSES)
    draws = Draws(9, 2)
    whole = scores_of(model, samples, draws, 8)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = scores_of(model, samples.take(order), draws, 8)
    part = scores_of(model, samples.take(torch.arange(3)), draws, 8)
    for batch_size in (1, 13):
        other = scores_of(model, samples, draws, batch_size)
        for name, values in whole.items():
            assert same(other[name], values)
    for name, values in whole.items():
        assert same(shuffled[name], values[order]) and same(part[name], values[:3])


def test_moso_does_not_depend_on_who_is_beside_it():
    model, (_, samples) = small_dit(CLASSES), small_set(CLASSES)
    draws = Draws(9, 3)
    mean = {name: value / N for name, value in sums_of(model, samples, draws, 24)[0].items()}
    whole = products_of(model, mean, samples, draws, 24)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for got, values in zip(products_of(model, mean, samples.take(order), draws, 24), whole, strict=True):
        assert same(got, values[order])
    for batch_size in (1, 48):
        for got, values in zip(products_of(model, mean, samples, draws, batch_size), whole, strict=True):
            assert same(got, values)
        total, _ = sums_of(model, samples, draws, batch_size)
        for name, value in mean.items():
            assert torch.allclose(total[name] / N, value, rtol=0, atol=1e-6 * float(value.norm()))


def test_partial_sums_of_shards_add_up():
    model, (_, samples) = small_dit(CLASSES), small_set(CLASSES)
    whole, _ = sums_of(model, samples, Draws(9, 1), 4)
    parts = [sums_of(model, samples.take(rows), Draws(9, 1), 4) for rows in torch.arange(N).split(5)]
    assert [count for _, count in parts] == [5, 5, 1]
    for name, value in whole.items():
        assert torch.allclose(sum(part[name] for part, _ in parts), value, rtol=0, atol=1e-6 * float(value.norm()))


def test_a_sample_that_is_not_finite_spoils_nothing_else():
    model, (_, samples) = small_dit(CLASSES), small_set(CLASSES)
    draws, bad = Draws(9, 2), samples.labels == 3
    assert 0 < bad.sum() < N
    good = torch.arange(N)[~bad]
    mean = {name: value / len(good) for name, value in sums_of(model, samples.take(good), draws, 4)[0].items()}
    clean = scores_of(model, samples.take(good), draws, 4)
    products = products_of(model, mean, samples.take(good), draws, 4)
    model.y_embedder.embedding_table.weight.data[3] = torch.nan
    got = scores_of(model, samples, draws, 4)
    for name, values in clean.items():
        assert torch.equal(got[name][good], values) and not got[name][bad].isfinite().any()
    total, count = sums_of(model, samples, draws, 4)
    assert count == len(good)
    for name, value in mean.items():
        assert torch.allclose(total[name] / count, value, rtol=0, atol=1e-6 * float(value.norm()))
    for got_products, values in zip(products_of(model, mean, samples, draws, 4), products, strict=True):
        assert torch.equal(got_products[good], values) and not got_products[bad].isfinite().any()


def test_padding_repeats_the_last_row():
    _, samples = small_set(CLASSES)
    batches: list[tuple[Samples, int]] = []

    def work(batch: Samples, real: int) -> dict[str, Tensor]:
        batches.append((batch, real))
        return {"hash": batch.hashes[:real]}

    assert torch.equal(in_batches(samples, 1, BatchSize(5), work)["hash"], samples.hashes)
    assert [(len(batch), real) for batch, real in batches] == [(8, 8), (8, 3)]
    assert torch.equal(batches[1][0].hashes, samples.hashes[[8, 9, 10, 10, 10, 10, 10, 10]])


@pytest.mark.parametrize(("draws", "rows", "expected"), [(3, 24, 8), (3, 8, 8), (4, 20, 6), (16, 8, 1), (12, 30, 2)])
def test_all_draws_of_a_batch_are_a_multiple_of_8_rows(draws, rows, expected):
    _, samples = small_set(CLASSES)
    sizes = []

    def work(batch: Samples, real: int) -> dict[str, Tensor]:
        sizes.append(len(batch))
        return {"hash": batch.hashes[:real]}

    in_batches(samples, draws, BatchSize(rows), work)
    assert set(sizes) == {expected} and expected * draws % 8 == 0


def test_no_samples_give_no_scores():
    model, (_, samples) = small_dit(0), small_set(0)
    none = samples.take(torch.arange(0))
    assert [len(values) for values in scores_of(model, none, Draws(0, 2), 4).values()] == [0, 0, 0]
    total, count = sums_of(model, none, Draws(0, 2), 4)
    assert count == 0 and len(products_of(model, total, none, Draws(0, 2), 4)[0]) == 0


def test_monotonicity_counts_the_rises():
    losses = torch.tensor([[3.0, 1, 2, 5], [2, 2, 2, torch.nan], [1, 3, 2, 4], [2, 4, 1, 3]]).double()
    got = monotonicity(losses)
    assert got[:3].tolist() == [pytest.approx(1 / 3), 1, 0] and got[3].isnan()
    with pytest.raises(InputError, match="at least 2 checkpoints, got 1"):
        monotonicity(losses[:1])


def test_random_depends_on_key_and_seed_alone():
    keys = [str(i) for i in range(500)]
    values = random_scores(keys, 1)
    assert torch.equal(values[7:9], random_scores(keys[7:9], 1)) and not torch.equal(values, random_scores(keys, 2))
    assert (values.sort().values - torch.linspace(0, 1, 500)).abs().max() < 1.63 / 500**0.5


@pytest.mark.parametrize("field", [RANDOM, LOSS, EL2N, GRAND, MONOTONICITY, *map(moso_field, MODES)])
def test_columns_say_what_they_mean_and_which_end_is_kept(field):
    assert field.metadata[b"keep"] == b"highest" and len(field.metadata[b"meaning"]) > 20

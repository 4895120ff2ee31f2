"""What `score` can be asked for beyond its defaults, against definitions from one-at-a-time float64 gradients."""

from __future__ import annotations

import errno
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_scores import N, philox_draw, reference, spearman
from test_scoring import Small, table_bytes, worst, write_checkpoint, write_latents
from typer.testing import CliRunner

import diffprune.memory
import diffprune.passes
import diffprune.scores.batches
import diffprune.scores.visit
import diffprune.scoring
from diffprune.cli.app import app
from diffprune.draws import hash_keys, uniform
from diffprune.errors import DiskFullError, InputError
from diffprune.files import TEMPORARY_PREFIX
from diffprune.memory import BatchSize, OutOfMemory, find_batch_size, rows_that_fit
from diffprune.scores.batches import Draws, Network, Samples
from diffprune.scores.mean_gradients import GradientSum, MeanGradient
from diffprune.scores.moso import in_group, moso
from diffprune.scores.normalise import strata, strata_count
from diffprune.scores.visit import visit
from diffprune.tables import read_folder, table_metadata
from diffprune.tensor_files import load_tensors


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path)


def column(found: dict[str, dict[str, float]], name: str, keys: list[str]) -> torch.Tensor:
    return torch.tensor([found[name][key] for key in keys], dtype=torch.float64)


# --- draws


def test_antithetic_draws_are_pairs_of_one_t_with_opposite_noise():
    hashes = hash_keys([str(i) for i in range(50)])
    draws = Draws(3, 6, antithetic=True)
    pairs = [draws.pair(hashes, draw, torch.Size((4,))) for draw in range(6)]
    for pair in range(3):
        (t, x0), (other_t, other_x0) = pairs[2 * pair : 2 * pair + 2]
        assert torch.equal(t, other_t) and torch.equal(x0, -other_x0)
        assert ((t >= pair / 3) & (t < (pair + 1) / 3)).all()
    assert not torch.equal(pairs[0][1], pairs[2][1])
    t, noise = philox_draw(3, "7", 1, 3, (4,))  # pair 1 is draw 1 of 3
    assert pairs[2][0][7].item() == pytest.approx(t) and pairs[2][1][7].tolist() == pytest.approx(noise.tolist())
    with pytest.raises(InputError, match="even number for antithetic pairs, got 3"):
        Draws(0, 3, antithetic=True)


def test_antithetic_pairs_cancel_what_is_odd_in_the_noise():
    hashes = hash_keys([str(i) for i in range(2000)])
    plain, pairs = Draws(1, 2), Draws(1, 2, antithetic=True)

    def spread(draws: Draws) -> float:  # of the mean over draws of something that is nearly odd in the noise
        values = [
            x0[:, 0] * (1 + t) + 0.1 * x0[:, 0] ** 2
            for t, x0 in (draws.pair(hashes, j, torch.Size((4,))) for j in (0, 1))
        ]
        assert torch.stack(values).mean().item() == pytest.approx(0.1, abs=0.1)  # neither is biased
        return torch.stack(values).mean(dim=0).std().item()

    assert spread(pairs) < 0.2 * spread(plain)


def test_antithetic_is_part_of_the_config(small):
    small.score(methods=METHODS_OF_ONE, draws=2, antithetic=True)
    assert table_metadata(read_folder(small.root / "scores"))["config"]["antithetic"] is True
    with pytest.raises(diffprune.errors.ResumeError, match="antithetic was True, is now None"):
        small.score(methods=METHODS_OF_ONE, draws=2)


METHODS_OF_ONE = ("loss", "el2n", "grand")


@pytest.mark.parametrize("draws", [1, 3])
def test_normalised_scores_are_draws_over_their_stratums_mean(small, draws):
    columns, _ = small.score(methods=METHODS_OF_ONE, draws=draws, normalise_t=True, seed=4)
    found = visit(Network(small.models[1]), small.samples, Draws(4, draws), BatchSize(64), norms=True)
    times = [[philox_draw(4, key, draw, draws, (4, 8, 8))[0] for draw in range(draws)] for key in small.keys]
    count = {1: 8, 3: 9}[draws]
    where = (torch.tensor(times) * count).long()
    for name in METHODS_OF_ONE:
        expected = torch.zeros(N, dtype=torch.float64)
        for i in range(N):
            for j in range(draws):
                expected[i] += found[name][i, j] / found[name][where == where[i, j]].mean() / draws
        assert worst(columns[name], small.keys, expected) < 1e-10
    meaning = read_folder(small.root / "scores").schema.field("loss").metadata[b"meaning"]
    assert b"over the mean" in meaning


def test_normalised_scores_do_not_depend_on_the_order_of_samples(small):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    other = write_latents(small.root / "other", [order[:2], order[2:9], order[9:]], small.keys, small.samples)
    before, _ = small.score("before", methods=METHODS_OF_ONE, draws=2, normalise_t=True)
    after, _ = small.score("after", methods=METHODS_OF_ONE, draws=2, normalise_t=True, latents=other)
    plain, _ = small.score("plain", methods=METHODS_OF_ONE, draws=2)
    for name in METHODS_OF_ONE:
        assert worst(after[name], small.keys, column(before, name, small.keys)) < 1e-12
        assert plain[name] != before[name]


@pytest.mark.parametrize(
    ("draws", "antithetic", "count"), [(1, False, 8), (3, False, 9), (16, False, 16), (6, True, 9)]
)
def test_a_stratum_of_t_is_a_whole_part_of_what_draws_are_stratified_over(draws, antithetic, count):
    _, samples = small_samples()
    draws = Draws(0, draws, antithetic)
    where = strata(samples, draws)
    assert strata_count(draws) == count and where.max() < count
    of_draw = where * (draws.count // (2 if antithetic else 1)) // count
    assert torch.equal(of_draw, (torch.arange(draws.count) // (2 if antithetic else 1)).expand_as(of_draw))


def small_samples() -> tuple[list[str], Samples]:
    keys = [str(i) for i in range(200)]
    return keys, Samples(hash_keys(keys), torch.zeros(200, 4, 8, 8), None)


# --- MoSo's support sets, learning rates, and the estimate


def gradients_of(small: Small, seed: int = 0) -> list[torch.Tensor]:
    return [reference(model, small.keys, small.samples, seed, 1).gradients for model in small.models]


def test_explicit_learning_rates_go_with_the_checkpoints_as_given(small):
    paths = [small.run / "step_00000400", small.run / "step_00000200"]
    same, _ = small.score("same", methods="moso", checkpoints=paths, learning_rates=[1e-3, 3e-3])
    usual, _ = small.score("usual", methods="moso")
    swapped, _ = small.score("swapped", methods="moso", checkpoints=paths, learning_rates=[3e-3, 1e-3])
    double, _ = small.score("double", methods="moso", learning_rates=[2e-3])
    assert same["moso"] == usual["moso"] != swapped["moso"]
    assert table_metadata(read_folder(small.root / "swapped"))["config"]["learning_rates"] == [1e-3, 3e-3]
    terms = [(N * g.mean(dim=0) - g).mul(g).sum(dim=1) / (N - 1) * 600 / N * 2e-3 for g in gradients_of(small)]
    assert worst(double["moso"], small.keys, (terms[0] + terms[1]) / 2) < 1e-5
    for rates in ([1.0, 2.0, 3.0], [0.0], [float("nan")]):
        with pytest.raises(InputError, match="learning_rates: expected one positive number"):
            small.score("bad", methods="moso", learning_rates=rates)


@pytest.mark.parametrize("mode", ["paper", "loo1"])
def test_a_trial_scores_its_samples_within_its_own_support_set(small, mode):
    columns, _ = small.score(methods=("moso", "grand"), trials=2, moso_mode=mode, seed=1)
    trial = (uniform(1, small.keys, "moso trial") * 2).long()
    assert 2 <= (trial == 0).sum() <= N - 2
    expected = torch.zeros(N, dtype=torch.float64)
    for gradients, rate in zip(gradients_of(small, 1), small.rates, strict=True):
        for one in (0, 1):
            g = gradients[trial == one]
            n, mean = len(g), g.mean(dim=0)
            without = (n * mean - g) / (n - 1)
            term = 600 / n * (without * g).sum(dim=1) if mode == "paper" else (without * (mean - without)).sum(dim=1)
            expected[trial == one] += rate * term / 2
    assert worst(columns["moso"], small.keys, expected) < 1e-4
    plain, _ = small.score("plain", methods="grand", seed=1)
    assert worst(columns["grand"], small.keys, column(plain, "grand", small.keys)) < 1e-12
    assert b"own support set, one of 2" in read_folder(small.root / "scores").schema.field("moso").metadata[b"meaning"]


@pytest.mark.parametrize("mode", ["paper", "loo1", "authors"])
def test_a_support_fraction_stands_for_the_others(small, mode):
    columns, _ = small.score(methods="moso", support_fraction=0.5, moso_mode=mode, seed=2)
    inside = uniform(2, small.keys, "moso support") < 0.5
    assert 2 <= inside.sum() <= N - 2
    expected = torch.zeros(N, dtype=torch.float64)
    for gradients, rate in zip(gradients_of(small, 2), small.rates, strict=True):
        for i, g in enumerate(gradients):
            others = inside.clone()
            others[i] = False
            h = gradients[others].mean(dim=0)
            mean = ((N - 1) * h + g) / N
            parts = {
                "paper": 600 / N * rate * (h @ g),
                "loo1": rate * (h @ (mean - h)),
                "authors": ((2 * N - 3) * (mean @ mean) + (2 * N - 4) * (mean @ g) - (3 - 4 / N) * (g @ g))
                / (N - 1) ** 2,
            }
            expected[i] += parts[mode] / 2
    got = column(columns, "moso", small.keys)
    assert ((got - expected).abs() < 1e-5 * expected.abs().max()).all()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    other = write_latents(small.root / "other", [order[:5], order[5:]], small.keys, small.samples)
    again, _ = small.score("again", methods="moso", support_fraction=0.5, moso_mode=mode, seed=2, latents=other)
    assert ((column(again, "moso", small.keys) - got).abs() < 1e-6 * got.abs().max()).all()


@pytest.mark.parametrize("mode", ["paper", "loo1"])
def test_one_pass_compares_a_sample_with_its_group(small, mode):
    latents = write_latents(small.root / "two", [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10]], small.keys, small.samples)
    columns, _ = small.score(methods=("moso", "grand"), one_pass=True, group_size=4, moso_mode=mode, latents=latents)
    groups = {0: range(4), 1: range(4), 2: range(4), 3: range(4), 4: range(2, 6), 5: range(2, 6)}
    groups |= dict.fromkeys(range(6, 10), range(6, 10)) | {10: range(7, 11)}
    expected = torch.zeros(N, dtype=torch.float64)
    for gradients, rate in zip(gradients_of(small), small.rates, strict=True):
        for i, g in enumerate(gradients):
            others = gradients[[j for j in groups[i] if j != i]]
            h = others.mean(dim=0)
            square = (others @ others.mT).fill_diagonal_(0).sum() / 6  # pairs of different others: 3 × 2
            square = (others**2).sum(dim=1).mean() / (N - 1) + (N - 2) / (N - 1) * square
            expected[i] += rate * (600 / N * (h @ g) if mode == "paper" else (h @ g - square) / N) / 2
    got = column(columns, "moso", small.keys)
    assert ((got - expected).abs() < 1e-5 * expected.abs().max()).all()
    field = read_folder(small.root / "scores").schema.field("moso")
    assert field.metadata[b"estimate"] == b"true" and b"ESTIMATE" in field.metadata[b"meaning"]
    plain, _ = small.score("plain", methods="grand", latents=latents)
    assert worst(columns["grand"], small.keys, column(plain, "grand", small.keys)) < 1e-6
    small.score(
        "eight", methods=("moso", "grand"), one_pass=True, group_size=4, moso_mode=mode, latents=latents, batch_size=8
    )
    assert table_bytes(small.root / "eight") == table_bytes(small.root / "scores")


def test_the_estimate_has_the_right_mean_over_groups():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(7, 3, generator=generator, dtype=torch.float64) + 0.5
    mean = gradients.mean(dim=0)
    totals = {mode: torch.zeros(7, dtype=torch.float64) for mode in ("paper", "loo1", "authors")}
    counts = torch.zeros(7)
    for rows in torch.combinations(torch.arange(7), 4):
        g = gradients[rows]
        dot, of_mean = in_group(7, g @ g.sum(dim=0), (g**2).sum(dim=1))
        counts[rows] += 1
        for mode, total in totals.items():
            total[rows] += moso(mode, 7, 10, 0.1, dot, of_mean, (g**2).sum(dim=1))
    for mode, total in totals.items():
        exact = moso(mode, 7, 10, 0.1, gradients @ mean, mean @ mean, (gradients**2).sum(dim=1))
        assert torch.allclose(total / counts, exact, rtol=1e-10), mode


def test_one_pass_leaves_out_a_sample_that_is_not_finite(small):
    small.models[1].y_embedder.embedding_table.weight.data[3] = torch.inf
    write_checkpoint(small.root / "broken", 400, small.models[1])
    bad = [i for i, label in enumerate(small.samples.labels.tolist()) if label == 3]
    good = [i for i in range(N) if i not in bad]
    options = {"methods": ("moso", "loss"), "one_pass": True, "group_size": N, "checkpoints": small.root / "broken"}
    whole = write_latents(small.root / "whole", [list(range(N))], small.keys, small.samples)
    fewer = write_latents(small.root / "fewer", [good], small.keys, small.samples)
    columns, result = small.score(latents=whole, **options)
    clean, _ = small.score("clean", latents=fewer, **options)
    assert result["failed_in_scoring"] == len(bad) > 0
    for i in good:
        assert columns["loss"][small.keys[i]] == pytest.approx(clean["loss"][small.keys[i]], rel=1e-6)
        ratio = columns["moso"][small.keys[i]] / clean["moso"][small.keys[i]]
        assert ratio == pytest.approx(len(good) / N, rel=1e-4)  # T/N counts the failed ones too
    assert all(columns["moso"][small.keys[i]] is None for i in bad)


def test_one_pass_is_refused_where_it_means_nothing(small):
    with pytest.raises(InputError, match="one_pass: expected no trials"):
        small.score(methods="moso", one_pass=True, trials=2)
    alone = write_latents(small.root / "alone", [[0, 1, 2], [3, 4]], small.keys, small.samples)
    with pytest.raises(InputError, match=r"shard-1 has 2 usable samples; one pass needs 3 or more"):
        small.score(methods="moso", one_pass=True, moso_mode="loo1", latents=alone)
    assert not (small.root / "scores").exists()


# --- the fold


def test_the_fold_does_not_depend_on_who_made_which_sum_and_when(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shards = [f"s{i}" for i in range(7)]
    sums = {
        s: GradientSum({"w": torch.randn(1000, generator=generator).double() * 10**i}, 3, 3)
        for i, s in enumerate(shards)
    }
    expected = sums["s0"].sums["w"]
    for shard in shards[1:]:
        expected = expected + sums[shard].sums["w"]
    asked: list[str] = []

    def shard_sum(shard: str) -> GradientSum:
        asked.append(shard)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sums[shard]

    mean = MeanGradient(tmp_path / "mean", shards)
    for shard in ("s5", "s2"):
        mean.put(shard, sums[shard])
    with pytest.raises(KeyboardInterrupt):
        mean.make(shard_sum)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"mean.sum", "s5", "s2"}
    mean.make(shard_sum)
    assert "s5" not in asked and "s2" not in asked
    found = mean.read(torch.device("cpu"))
    assert torch.equal(load_tensors(tmp_path / "mean.mean")[0]["w"], expected / 21)
    assert torch.equal(found.gradient["w"], (expected / 21).float()) and (found.samples, found.population) == (21, 21)
    assert found.sqnorm == pytest.approx((expected / 21).square().sum().item())
    assert [path.name for path in tmp_path.iterdir()] == ["mean.mean"]


def test_the_disk_that_the_fold_takes_does_not_grow_with_the_shards(tmp_path):
    most = 0

    def shard_sum(shard: str) -> GradientSum:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()))
        return GradientSum({"w": torch.ones(1000, dtype=torch.float64)}, 1, 1)

    MeanGradient(tmp_path / "mean", [str(i) for i in range(50)]).make(shard_sum)
    assert 8000 < most < 2 * 8000


# --- precision, compile


def test_bf16_ranks_nearly_the_same_and_is_part_of_the_config(small):
    exact, _ = small.score("exact", methods=("loss", "grand"))
    rounded, _ = small.score("rounded", methods=("loss", "grand"), precision="bf16")
    for name in ("loss", "grand"):
        a, b = column(exact, name, small.keys), column(rounded, name, small.keys)
        assert 1e-6 < ((a - b) / a).abs().max() < 0.05 and spearman(a, b) > 0.9
    assert table_metadata(read_folder(small.root / "rounded"))["config"]["precision"] == "bf16"
    small.score("rounded", methods=("loss", "grand"), precision="bfloat16")  # goes on there, as it is the same
    with pytest.raises(InputError, match="precision: expected one of float32, bf16, got 'fp8'"):
        small.score("bad", precision="fp8")


def test_compiled_networks_run_what_has_no_per_sample_gradients(small, monkeypatch):
    calls = []

    def compile(model: torch.nn.Module) -> Any:
        return lambda *args: (calls.append(torch.is_grad_enabled()), model(*args))[1]

    monkeypatch.setattr(torch, "compile", compile)
    plain, _ = small.score("plain", methods=("moso", "grand", "monotonicity"))
    assert not calls
    compiled, _ = small.score("compiled", methods=("moso", "grand", "monotonicity"), compile=True)
    assert calls == [True] * 6  # the first pass over 3 shards at 2 checkpoints
    small.score("losses", methods=("loss", "el2n"), compile=True)
    assert calls[6:] == [False] * 3
    assert compiled == plain
    assert table_metadata(read_folder(small.root / "compiled"))["config"]["compile"] is True


# --- memory


def test_out_of_memory_in_the_middle_halves_the_batch_and_goes_on(small, monkeypatch):
    methods = ("loss", "grand", "moso", "monotonicity")
    small.score("whole", methods=methods)
    seen: list[int] = []

    def limited(network: Network, samples: Samples, *args: Any) -> Any:
        seen.append(len(samples))
        if len(samples) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(network, samples, *args)

    original = diffprune.scores.batches.draw_losses
    for module in (diffprune.scores.visit, diffprune.scores.moso):
        monkeypatch.setattr(module, "draw_losses", limited)
    _, result = small.score("halved", methods=methods, batch_size=64)
    assert {64, 32, 16} <= set(seen) and result["batch_size"] == 16
    if torch.backends.mkl.is_available():  # the same, but for the float32 sums of the first pass
        whole, halved = (read_folder(small.root / name) for name in ("whole", "halved"))
        for name in ("loss", "grand", "monotonicity"):
            assert whole[name].equals(halved[name])


def test_out_of_memory_with_the_smallest_batch_is_an_error(small, monkeypatch):
    def out_of_memory(*args: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(diffprune.scores.visit, "draw_losses", out_of_memory)
    with pytest.raises(OutOfMemory, match=r"smallest batch, 8 rows \(\[enforce fail"):
        small.score()

    def other(*args: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(diffprune.scores.visit, "draw_losses", other)
    with pytest.raises(RuntimeError, match="something else"):
        small.score()


def fake_memory(monkeypatch: pytest.MonkeyPatch, per_row: int, base: int, until: int | None = None) -> list[int]:
    """A machine where a batch takes `per_row` bytes a row, and its rows get slower from `until` on."""
    tried, now, clock = [], [base], [0.0]

    def attempt(rows: int) -> None:
        tried.append(rows)
        now[0] = max(now[0], base + per_row * rows)
        clock[0] += rows if until and rows > until else rows / rows**0.5

    monkeypatch.setattr(diffprune.memory, "free_memory", lambda: None)
    monkeypatch.setattr(diffprune.memory, "resident_bytes", lambda: base)
    monkeypatch.setattr(diffprune.memory, "peak_bytes", lambda: now[0])
    monkeypatch.setattr(diffprune.memory.time, "perf_counter", lambda: clock[0])
    fake_memory.attempt = attempt
    return tried


@pytest.mark.parametrize(("limit", "expected"), [(100 + 8 * 10, 8), (100 + 16 * 10 + 5, 16), (100 + 64 * 10, 64)])
def test_the_batch_doubles_until_memory_is_short(monkeypatch, limit, expected):
    tried = fake_memory(monkeypatch, per_row=10, base=100)
    assert find_batch_size(fake_memory.attempt, 4096, torch.device("cpu"), limit) == expected
    assert max(tried) == expected  # never more than was allowed


def test_the_batch_doubles_until_it_is_no_faster_or_there_is_no_more_to_do(monkeypatch):
    fake_memory(monkeypatch, per_row=10, base=100, until=32)
    assert find_batch_size(fake_memory.attempt, 4096, torch.device("cpu"), 10**9) == 32
    assert find_batch_size(fake_memory.attempt, 12, torch.device("cpu"), 10**9) == 16
    with pytest.raises(InputError, match="not even 8 rows fit"):
        find_batch_size(fake_memory.attempt, 12, torch.device("cpu"), 110)


def test_a_batch_that_does_not_fit_is_one_step_too_many(monkeypatch):
    fake_memory(monkeypatch, per_row=10, base=100)

    def attempt(rows: int) -> None:
        if rows > 70:
            raise OutOfMemory("out of memory")
        fake_memory.attempt(rows)

    assert find_batch_size(attempt, 4096, torch.device("cuda"), None) == 64


def test_auto_is_found_once_and_changes_nothing(small, monkeypatch):
    small.score("given")
    monkeypatch.setattr(diffprune.passes, "find_batch_size", lambda attempt, most, device, memory: (attempt(16), 16)[1])
    _, result = small.score("auto", batch_size="auto")
    assert result["batch_size"] == 16
    if torch.backends.mkl.is_available():
        assert table_bytes(small.root / "auto") == table_bytes(small.root / "given")
    monkeypatch.undo()
    _, result = small.score("really", batch_size="auto", memory=64)
    assert result["batch_size"] in (8, 16)
    for bad in (0, "most"):
        with pytest.raises(InputError, match="batch_size: expected 1 or more, or auto"):
            small.score("bad", batch_size=bad)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [(100 + 64 * 10, 64), (100 + 64 * 10 - 1, 32), (100 + 33 * 10, 32), (100 + 9 * 10, 8), (90, 8)],
)
def test_the_usual_batch_if_memory_holds_it(monkeypatch, limit, expected):
    tried = fake_memory(monkeypatch, per_row=10, base=100)
    assert rows_that_fit(fake_memory.attempt, 64, limit) == expected
    assert tried == [8, 8]


def test_what_memory_held_before_does_not_count():
    for find in (
        lambda limit: rows_that_fit(lambda rows: None, 64, limit),
        lambda limit: find_batch_size(lambda rows: None, 8, torch.device("cpu"), limit),
    ):
        held = torch.ones(2**27)  # 512 MiB
        del held
        assert find(diffprune.memory.resident_bytes() + 2**28) >= 8
    held = torch.ones(2**27)
    del held
    assert rows_that_fit(lambda rows: None, 64, diffprune.memory.resident_bytes() + 2**28) == 64


def test_the_usual_batch_is_smaller_where_memory_is_short(small, monkeypatch):
    _, result = small.score("usual", batch_size=None)
    assert result["batch_size"] == 64
    asked = []

    def fewer(attempt, wanted, memory):
        asked.append((wanted, memory))
        attempt(8)
        return 16

    monkeypatch.setattr(diffprune.passes, "rows_that_fit", fewer)
    _, result = small.score("fewer", batch_size=None, memory=0.5)
    assert result["batch_size"] == 16 and asked == [(64, 2**29)]
    _, result = small.score("given", batch_size=64)
    assert result["batch_size"] == 64 and len(asked) == 1
    if torch.backends.mkl.is_available():
        assert table_bytes(small.root / "usual") == table_bytes(small.root / "fewer")


# --- a full disk


@pytest.mark.parametrize("where", ["fsync", "replace", "write"])
@pytest.mark.parametrize("number", [2, 7])
def test_a_full_disk_is_a_clear_error_and_what_is_finished_stays(small, monkeypatch, where, number):
    methods = ("loss", "moso")
    small.score("whole", methods=methods)
    full, calls = OSError(errno.ENOSPC, "No space left on device"), []

    def failing(original: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            calls.append(args)
            if len(calls) >= number:
                raise full
            return original(*args, **options)

        return function

    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(diffprune.tables.pq, "write_table", failing(diffprune.tables.pq.write_table))
        else:
            patch.setattr(os, where, failing(getattr(os, where)))
        if where == "write" and number > 3:
            return  # there are three tables
        with pytest.raises(DiskFullError, match=r"no space left on the disk .*\d of 3 shards are finished and kept"):
            small.score("full", methods=methods)
    left = [path for path in (small.root / "full").rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
    assert not left
    small.score("full", methods=methods)
    assert table_bytes(small.root / "full") == table_bytes(small.root / "whole")


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"batch_size": None, "learning_rates": None, "compile": False, "one_pass": False, "memory": None}),
        (
            ("--batch-size", "auto", "--memory", "1.5", "--compile"),
            {"batch_size": "auto", "memory": 1.5, "compile": True},
        ),
        (("--learning-rates", "1e-3,2e-4", "--trials", "4"), {"learning_rates": [1e-3, 2e-4], "trials": 4}),
        (("--batch-size", "0"), "expected a positive number, or auto"),
        (("--learning-rates", "fast"), "expected numbers with commas"),
    ],
)
def test_the_command_line_hands_options_over(monkeypatch, arguments, expected):
    called: dict[str, Any] = {}
    monkeypatch.setattr(diffprune, "score", lambda *args, **options: called.update(options) or {})
    result = CliRunner().invoke(app, ["score", "latents", "--checkpoint", "run", "-o", "out", *arguments])
    if isinstance(expected, dict):
        assert result.exit_code == 0, result.output
        assert {name: called[name] for name in expected} == expected
        assert set(called) == set(inspect.signature(diffprune.scoring.score).parameters) - {
            "latents",
            "checkpoints",
            "out",
        }
    else:
        assert result.exit_code == 2 and expected in " ".join(result.output.replace("│", " ").split()) and not called


# --- one pass for all


@pytest.mark.parametrize(
    ("methods", "draws", "backwards"),
    [
        (("loss", "el2n", "grand"), 1, 1),
        (("loss", "grand", "moso", "monotonicity"), 1, 2 + 2),  # two checkpoints: first pass and visit
        (("loss", "grand", "moso"), 2, 2 + 2 + 1),  # the norms of two draws are not the norm of their mean
        (("loss", "monotonicity"), 1, 0),
    ],
)
def test_methods_share_passes(small, monkeypatch, methods, draws, backwards):
    latents = write_latents(small.root / "one", [list(range(8))], small.keys, small.samples)
    calls = []
    original = diffprune.scores.batches.draw_losses
    for module in (diffprune.scores.visit, diffprune.scores.moso):
        monkeypatch.setattr(
            module, "draw_losses", lambda *args: (calls.append(torch.is_grad_enabled()), original(*args))[1]
        )
    small.score(methods=methods, draws=draws, latents=latents, batch_size=16)
    assert sum(calls) == backwards and len(calls) == (backwards or 2)


def test_a_source_need_not_be_a_folder(small):
    class Source:
        def __init__(self) -> None:
            folder = diffprune.scoring.ArrayFolder(small.latents)
            self.metadata, self.fingerprint, self.stems = folder.metadata, folder.fingerprint, folder.stems
            self.table, self.array = folder.table, folder.array

    small.score("folder")
    small.score("source", latents=Source())
    assert table_bytes(small.root / "folder") == table_bytes(small.root / "source")

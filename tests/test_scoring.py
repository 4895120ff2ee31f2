"""`score` from files to files: values by key against float64 autograd, resumes, bytes, and every refusal."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_scores import CLASSES, N, reference, small_dit, small_set

import diffprune.passes
import diffprune.scoring
from diffprune.arrays import write_array
from diffprune.checkpoints import save_checkpoint
from diffprune.config import DitRun
from diffprune.engines import run_stage
from diffprune.errors import InputError, ResumeError
from diffprune.models.dit import DiT
from diffprune.scores.batches import Samples
from diffprune.scoring import METHODS, score
from diffprune.shards import Member, Sample
from diffprune.tables import base_table, read_folder, read_stage, table_metadata

VQVAE_SHA, OTHER_SHA = "a" * 64, "b" * 64


def write_latents(
    folder: Path,
    shards: list[list[int]],
    keys: list[str],
    samples: Samples,
    failed: tuple[int, ...] = (),
    without_label: tuple[int, ...] = (),
    sha: str = VQVAE_SHA,
) -> Path:
    """What `encode` writes, for samples given by number: one shard per list of numbers. Failed ones are NaN."""

    def work(stem: str, bar: Any) -> pa.Table:
        rows = shards[int(stem[-1])]
        array = samples.latents[rows].numpy().copy()
        array[[row in failed for row in rows]] = np.nan
        write_array(folder / f"{stem}.npy", array)
        labels = [None if samples.labels is None or row in without_label else int(samples.labels[row]) for row in rows]
        entries = [
            Sample(keys[row], place, (Member(keys[row], "png", 512 * place, 512 * place, 512),))
            for place, row in enumerate(rows)
        ]
        errors = ["truncated" if row in failed else None for row in rows]
        return base_table(f"{stem}.tar", entries, labels, [None] * len(rows), errors)

    config = {"kind": "latents", "shape": list(samples.latents.shape[1:]), "model_sha256": sha, "latent_scale": 1.0}
    stems = [f"shard-{number}" for number in range(len(shards))]
    run_stage("encode", folder, {**config, "inputs": shards}, stems, work, total=N)
    return folder


def write_checkpoint(run: Path, step: int, model: DiT, lr: float = 1e-3, ema: DiT | None = None) -> Path:
    state = {
        "kind": "dit",
        "step": step,
        "total_steps": 600,
        "lr": lr,
        "images_seen": step * 8,
        "seed": 0,
        "config": asdict(DitRun(model=model.config)),
        "data": {},
        "latents": {"model_sha256": VQVAE_SHA},
    }
    return save_checkpoint(run, state, {"model": model.state_dict(), "ema": (ema or model).state_dict()})


def half(samples: Samples) -> Samples:
    """Latents as float16 stores them."""
    return Samples(samples.hashes, samples.latents.half().float(), samples.labels)


class Small:
    """Eleven samples in three shards and a surrogate of two checkpoints."""

    def __init__(self, root: Path, num_classes: int = CLASSES) -> None:
        self.root = root
        self.keys, samples = small_set(num_classes)
        self.samples = half(samples)
        self.latents = write_latents(
            root / "latents", [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]], self.keys, self.samples
        )
        self.models, self.rates = [small_dit(num_classes, seed, depth=1) for seed in (1, 2)], (3e-3, 1e-3)
        self.run = root / "run"
        for step, model, rate in zip((200, 400), self.models, self.rates, strict=True):
            write_checkpoint(self.run, step, model, rate, ema=self.models[0])

    def score(self, out: str = "scores", **options: Any) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
        """Column -> key -> value, and what `score` returned."""
        options = {"latents": self.latents, "checkpoints": self.run, "batch_size": 8, "device": "cpu", **options}
        result = score(options.pop("latents"), options.pop("checkpoints"), self.root / out, **options)
        table = read_folder(self.root / out)
        keys = table["key"].to_pylist()
        columns = [name for name in table.column_names if name in METHODS or name in ("status", "error")]
        return {name: dict(zip(keys, table[name].to_pylist(), strict=True)) for name in columns}, result


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return Small(tmp_path)


def worst(found: dict[str, float], keys: list[str], expected: torch.Tensor) -> float:
    got = torch.tensor([found[key] for key in keys], dtype=torch.float64)
    return ((got - expected) / expected).abs().max().item()


@pytest.mark.parametrize(("num_classes", "mode"), [(CLASSES, "paper"), (0, "authors")])
def test_all_scores_by_key_equal_float64_autograd(tmp_path, num_classes, mode):
    small = Small(tmp_path, num_classes)
    columns, result = small.score(methods=METHODS, seed=3, draws=3, moso_mode=mode)
    expected = [reference(model, small.keys, small.samples, 3, 3) for model in small.models]
    for name in ("loss", "el2n", "grand"):
        assert worst(columns[name], small.keys, getattr(expected[1], name)) < 1e-5
    terms = []
    for one, rate in zip(expected, small.rates, strict=True):
        mean = one.gradients.mean(dim=0)
        if mode == "paper":
            terms.append(600 / N * rate * (((N * mean - one.gradients) / (N - 1)) * one.gradients).sum(dim=1))
        else:
            square, dot = (one.gradients**2).sum(dim=1), one.gradients @ mean
            terms.append(((2 * N - 3) * (mean @ mean) + (2 * N - 4) * dot - (3 - 4 / N) * square) / (N - 1) ** 2)
    assert worst(columns["moso"], small.keys, (terms[0] + terms[1]) / 2) < 1e-5
    rose = (expected[1].loss > expected[0].loss).double().tolist()
    assert [columns["monotonicity"][key] for key in small.keys] == rose and 0 < sum(rose) < N
    assert all(0 <= value < 1 for value in columns["random"].values())
    assert (result["samples"], result["failed"], result["failed_in_scoring"]) == (N, 0, 0)
    assert not (tmp_path / "scores" / "_partials").exists()


def test_a_key_has_one_score_in_any_shard_order_and_batch(small):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).tolist()
    other = write_latents(small.root / "other", [order[:2], [], order[2:9], order[9:]], small.keys, small.samples)
    before, _ = small.score(methods=METHODS, draws=2)
    for number, options in enumerate(({"latents": other}, {"latents": other, "batch_size": 32})):
        after, _ = small.score(f"again{number}", methods=METHODS, draws=2, **options)
        for name in METHODS:
            expected = torch.tensor([before[name][key] for key in small.keys], dtype=torch.float64)
            got = torch.tensor([after[name][key] for key in small.keys], dtype=torch.float64)
            assert ((got - expected).abs() <= 1e-6 * expected.abs().max()).all(), name


@pytest.mark.parametrize("options", [{}, {"draws": 3}])
def test_the_batch_size_does_not_show(small, options):
    small.score("eight", methods=METHODS, batch_size=8, **options)
    small.score("more", methods=METHODS, batch_size=40, **options)
    if torch.backends.mkl.is_available():
        assert table_bytes(small.root / "eight") == table_bytes(small.root / "more")


def test_batch_size_and_threads_do_not_show_where_products_are_wide(small):
    """By itself MKL rounds a row of these otherwise beside other rows or with other threads; `prepare` stops it."""
    if "STRICT" not in os.environ.get("MKL_CBWR", "") or not torch.backends.mkl.is_available():
        pytest.skip("needs MKL on an Intel processor")
    generator = torch.Generator().manual_seed(0)
    model = DiT(input_size=8, in_channels=4, hidden_size=384, depth=1, num_heads=6, num_classes=CLASSES)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    for step in (200, 400):
        write_checkpoint(small.root / "wide", step, model)
    threads = torch.get_num_threads()
    try:
        for number, (batch_size, count) in enumerate([(8, 1), (40, 1), (8, 2), (24, 3)]):
            torch.set_num_threads(count)
            options = {"checkpoints": small.root / "wide", "batch_size": batch_size, "methods": METHODS, "draws": 2}
            small.score(f"scores{number}", **options)
            assert table_bytes(small.root / f"scores{number}") == table_bytes(small.root / "scores0")
    finally:
        torch.set_num_threads(threads)


def table_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_run_gives_the_same_bytes_and_a_finished_one_does_nothing(small, monkeypatch):
    small.score("one", methods=METHODS, draws=2)
    small.score("two", methods=METHODS, draws=2)
    assert table_bytes(small.root / "one") == table_bytes(small.root / "two")
    assert set(table_bytes(small.root / "one")) == {"stage.json", *(f"shard-{i}.parquet" for i in range(3))}
    for name in ("visit", "gradient_sum"):
        monkeypatch.setattr(diffprune.passes, name, None)
    _, result = small.score("one", methods=METHODS, draws=2)
    assert result["shards_done_before"] == 3


@pytest.mark.parametrize(("function", "call"), [("gradient_sum", 1), ("gradient_sum", 5), ("visit", 2), ("visit", 5)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(small, monkeypatch, function, call):
    small.score("whole", methods=METHODS)
    calls, original = [], getattr(diffprune.passes, function)

    def stopped(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(diffprune.passes, function, stopped)
        with pytest.raises(KeyboardInterrupt):
            small.score("stopped", methods=METHODS)
    done = sorted(path.name for path in (small.root / "stopped").glob("*.parquet"))
    assert done == (["shard-0.parquet"] if (function, call) == ("visit", 5) else [])
    counted = counting(monkeypatch, "gradient_sum")
    small.score("stopped", methods=METHODS)
    assert table_bytes(small.root / "whole") == table_bytes(small.root / "stopped")
    # Of 3 shards × 2 checkpoints. The second shard's sum is in a commit only if the first one's was quick to write.
    left = {("gradient_sum", 1): {6}, ("gradient_sum", 5): {2, 3}, ("visit", 2): {3}, ("visit", 5): {0}}
    assert len(counted) in left[function, call]


def counting(monkeypatch: pytest.MonkeyPatch, function: str) -> list:
    calls, original = [], getattr(diffprune.passes, function)

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(diffprune.passes, function, counted)
    return calls


def test_another_config_is_refused_by_name(small):
    small.score(seed=1)
    before = table_bytes(small.root / "scores")
    for options, message in (
        ({"seed": 2}, "seed was 1, is now 2"),
        ({"seed": 1, "draws": 2}, "draws was 1, is now 2"),
        ({"seed": 1, "methods": ["loss"]}, "methods was"),
        ({"seed": 1, "weights": "ema"}, "checkpoints was"),
        ({"seed": 1, "checkpoints": small.run / "step_00000200"}, "checkpoints was"),
    ):
        with pytest.raises(ResumeError, match=message):
            small.score(**options)
    assert table_bytes(small.root / "scores") == before
    small.score(seed=1, batch_size=3)  # changes nothing: no reason to refuse


def test_failed_samples_keep_null_scores_and_count_for_nothing(small):
    clean, _ = small.score(
        "clean",
        methods=METHODS,
        latents=write_latents(small.root / "fewer", [[0, 1, 3], [4, 6], [7, 8, 9, 10]], small.keys, small.samples),
    )
    damaged = write_latents(
        small.root / "damaged", [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10]], small.keys, small.samples, failed=(2, 5)
    )
    columns, result = small.score("damaged-scores", methods=METHODS, latents=damaged)
    for number, key in enumerate(small.keys):
        for name in METHODS:
            if number in (2, 5):
                assert columns[name][key] is None and columns["error"][key] == "truncated"
            else:
                assert columns[name][key] == pytest.approx(clean[name][key], rel=1e-6)
    assert (result["samples"], result["failed"], result["failed_in_scoring"]) == (N, 2, 0)


def test_a_score_that_is_not_finite_is_a_failed_row_and_the_rest_stand(small):
    bad = [key for key, label in zip(small.keys, small.samples.labels.tolist(), strict=True) if label == 3]
    good = [number for number, key in enumerate(small.keys) if key not in bad]
    assert bad and good
    clean, _ = small.score(
        "clean", methods=METHODS, latents=write_latents(small.root / "fewer", [good], small.keys, small.samples)
    )
    broken = small.root / "broken"
    for step, model, rate in zip((200, 400), small.models, small.rates, strict=True):
        model.y_embedder.embedding_table.weight.data[3] = torch.inf
        write_checkpoint(broken, step, model, rate)
    columns, result = small.score(methods=METHODS, checkpoints=broken)
    assert (result["failed"], result["failed_in_scoring"]) == (len(bad), len(bad))
    assert result["first_error"]["key"] == bad[0]
    for key in small.keys:
        assert columns["status"][key] == ("failed" if key in bad else "ok")
        if key in bad:
            assert "is not finite (nan)" in columns["error"][key]
        for name in METHODS:
            expected = None if key in bad else pytest.approx(clean[name][key], rel=1e-6)
            assert columns[name][key] == expected, name


def test_latents_that_are_not_finite_are_failed_rows(small):
    small.samples.latents[6, 0, 0, 0] = torch.inf
    latents = write_latents(small.root / "infinite", [list(range(N))], small.keys, small.samples)
    columns, result = small.score(latents=latents)
    assert result["failed_in_scoring"] == 1
    assert columns["error"][small.keys[6]] == "its loss is not finite (nan)"


def test_last_checkpoint_for_grand_and_both_weights(small):
    first, _ = small.score("first", checkpoints=small.run / "step_00000200")
    last, _ = small.score("last", checkpoints=small.run)
    given, result = small.score("given", checkpoints=[small.run / "step_00000400", small.run / "step_00000200"])
    ema, _ = small.score("ema", weights="ema")  # the second checkpoint's EMA is the first one's model
    assert given == last != first == ema
    assert result["checkpoints"] == [str(small.run / "step_00000400")]


def test_a_column_does_not_depend_on_which_others_are_asked_for(small):
    everything, _ = small.score("all", methods=METHODS, moso_mode="loo1")
    for name in ("loss", "grand", "moso", "monotonicity"):
        alone, _ = small.score(name, methods=name, moso_mode="loo1")
        for key in small.keys:
            assert alone[name][key] == pytest.approx(everything[name][key], rel=1e-6)


def test_tables_say_what_they_hold(small):
    small.score(methods=("moso", "grand"), moso_mode="loo1", seed=5, draws=2)
    table = read_folder(small.root / "scores")
    assert table.column_names[-2:] == ["moso", "grand"]
    for name in ("moso", "grand"):
        field = table.schema.field(name)
        assert field.type == pa.float64() and field.metadata[b"keep"] == b"highest"
    assert b"leave-one-out" in table.schema.field("moso").metadata[b"meaning"]
    config = table_metadata(table)["config"]
    assert (config["seed"], config["draws"], config["moso_mode"]) == (5, 2, "loo1")
    assert [len(sha) for sha in config["checkpoints"]] == [64, 64]
    assert read_stage(small.root / "scores")["metadata"]["checkpoint_paths"] == [
        str(small.run / f"step_{step:08d}") for step in (200, 400)
    ]


def test_random_needs_no_checkpoint(small):
    columns, result = small.score(methods="random", checkpoints=[])
    assert len(set(columns["random"].values())) == N and result["checkpoints"] == []


def test_dry_run_writes_nothing(small):
    out = small.root / "scores"
    plan = score(small.latents, small.run, out, methods=METHODS, draws=4, device="cpu", dry_run=True)
    assert not out.exists()
    assert (plan["images_in_all"], plan["shards"], plan["draws"], plan["sweeps"]) == (
        N,
        3,
        4,
        5,
    )  # 2 × (first pass + visit) + grand


def test_conditional_surrogates_want_a_label_of_theirs_for_every_key(small):
    missing = write_latents(
        small.root / "missing", [list(range(N))], small.keys, small.samples, failed=(2,), without_label=(2, 7, 8)
    )
    with pytest.raises(InputError, match=r"shard-0\.parquet: key '001/7': expected a label from 0 to 4.*found None"):
        small.score(latents=missing)
    small.samples.labels[4] = CLASSES
    beyond = write_latents(small.root / "beyond", [list(range(N))], small.keys, small.samples)
    with pytest.raises(InputError, match=r"key '001/4': .*found 5"):
        small.score(latents=beyond)
    assert not (small.root / "scores").exists()


def test_latents_that_do_not_fit_are_refused(small):
    keys, samples = small.keys, small.samples
    wide = Samples(samples.hashes, torch.zeros(N, 4, 8, 16), samples.labels)
    cases = [
        (
            write_latents(small.root / "wide", [[0]], keys, wide),
            r"expects latents of shape \(4, 8, 8\), found \(4, 8, 16\)",
        ),
        (write_latents(small.root / "other", [[0]], keys, samples, sha=OTHER_SHA), "made by the VQ-VAE bbbbbbbbbbbb"),
        (small.root / "nothing", "no stage.json"),
    ]
    for latents, message in cases:
        with pytest.raises(InputError, match=message):
            small.score(latents=latents)
    assert not (small.root / "scores").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("loss", "forgetting")}, "expected some of random, .*'forgetting'"),
        ({"methods": ()}, "got none"),
        ({"draws": 0}, "draws: expected 1 or more, got 0"),
        ({"draws": 1 << 64}, "draws: expected at most 4294967295, got"),
        ({"trials": 1 << 64}, "trials: expected at most 4294967295, got"),
        ({"memory": float("inf")}, "memory: expected a positive number of GiB, got inf"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"seed": -1}, "seed: expected 0 to 4294967295, got -1"),
        ({"methods": ["moso"], "moso_mode": "exact"}, "expected one of paper, loo1, authors, got 'exact'"),
        ({"weights": "best"}, "expected ema or model"),
        ({"checkpoints": []}, "expected a run folder or checkpoints"),
        ({"checkpoints": ["run/step_00000200"] * 2}, "expected different steps"),
        ({"methods": ["monotonicity"], "checkpoints": ["run/step_00000400"]}, "at least 2 checkpoints, got 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(small, options, message):
    if "checkpoints" in options:
        options = {**options, "checkpoints": [small.root / path for path in options["checkpoints"]]}
    with pytest.raises(InputError, match=message):
        small.score(**options)
    assert not (small.root / "scores").exists()


def test_moso_wants_two_samples(small):
    one = write_latents(small.root / "one", [[0, 1], [2]], small.keys, small.samples, failed=(0, 2))
    with pytest.raises(InputError, match="at least 2 samples, found 1"):
        small.score(latents=one, methods=["moso"])
    assert not (small.root / "scores").exists()


def test_progress_reaches_the_end_once(small, monkeypatch):
    told: list[int] = []

    class Bar:
        def advance(self, amount: int = 1, *, note: str = "") -> None:
            told.append(amount)

    original: Callable[..., pa.Table] = diffprune.scoring._table
    monkeypatch.setattr(
        diffprune.scoring, "_table", lambda passes, fields, stem, _: original(passes, fields, stem, Bar())
    )
    damaged = write_latents(
        small.root / "damaged", [[0, 1, 2, 3, 4], [5, 6, 7]], small.keys, small.samples, failed=(2,)
    )
    small.score(latents=damaged, methods=METHODS)
    assert sum(told) == 8 and min(told) >= 0

"""A tiny sweep end to end; that order, processes and kills change nothing; and what a config must say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from scipy.stats import ttest_rel
from small_run import write_digits
from typer.testing import CliRunner

import diffprune
from diffprune.checkpoints import read_state
from diffprune.cli.app import app
from diffprune.config import from_dict, load_config
from diffprune.errors import DiffpruneError, InputError, ResumeError
from diffprune.reporting.sweep_page import _looks
from diffprune.sweeping.cells import list_cells, run_cell
from diffprune.sweeping.results import write_results
from diffprune.sweeping.running import worker_device
from diffprune.sweeping.settings import differences, load_sweep
from diffprune.tables import kept_keys, read_folder

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "<img src=x onerror=alert(1)>&\"'"

TINY = """
[sweep]
title = "Tiny"
methods = ["random", "grand-high", "cluster-balanced"]
prune = [0.5]
seeds = [0, 1]

[data]
source = "SOURCE"
resize = 16
held_out = 0.2

[vqvae.model]
image_size = 16
codebook_size = 32

[vqvae.train]
steps = 6
batch_size = 16
ema_decay = 0.0

[dit.model]
input_size = 4
hidden_size = 32
depth = 2
num_heads = 2

[dit.train]
steps = 6
batch_size = 16
lr = 3e-3
ema_decay = 0.9

[surrogate.train]
checkpoint_every = 3
seed = 7

[cluster]
k = 4

[sample]
count = 24
steps = 3
guidance = 1.5

[evaluate]
model = "classifier"
reference = "held-out"
"""
CELLS = ["full-s0", "random-50-s0", "grand-high-50-s0", "cluster-balanced-50-s0"]
CELLS += [name.replace("s0", "s1") for name in CELLS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """The config of a tiny sweep; its images lie beside it."""
    root = tmp_path_factory.mktemp("tiny")
    write_digits(root / "images", count=120)
    (root / "tiny.toml").write_text(TINY.replace("SOURCE", str(root / "images")))
    return root / "tiny.toml"


@pytest.fixture(scope="module")
def done(tiny) -> Path:
    """The whole sweep, in this process, one cell after the other. Tests must not write into it."""
    out = tiny.parent / "done"
    report = diffprune.sweep(tiny, out)
    assert (report["cells"], report["done"], report["run"], report["left"]) == (8, 8, CELLS, [])
    return out


def begun(done: Path, out: Path) -> Path:
    """A sweep whose shared stages are done, and no cell."""
    shutil.copytree(done / "shared", out / "shared")
    shutil.copy(done / "sweep.json", out)
    return out


def changed(tiny: Path, path: Path, *changes: tuple[str, str]) -> Path:
    text = tiny.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def result(out: Path, cell: str) -> dict:
    return json.loads((out / "cells" / cell / "result.json").read_text())


def test_the_whole_comparison(done):
    table = pq.read_table(done / "results.parquet")
    assert table["name"].to_pylist() == CELLS
    assert table["training_images"].to_pylist() == [100, 50, 50, 50] * 2
    assert set(table["reference_images"].to_pylist()) == {20} and set(table["samples"].to_pylist()) == {24}
    assert all(
        value is not None and value == value
        for name in ("frechet_distance", "precision", "vendi_score", "memorization_ratio", "label_agreement")
        for value in table[name].to_pylist()
    )
    far = [result(done, name)["classes"]["kl_uniform"] for name in CELLS]
    assert table["class_kl_uniform"].to_pylist() == far and "Unequal classes ↓" in (done / "results.md").read_text()
    told = result(done, "grand-high-50-s1")
    assert told["setting"]["reference"] == {"split": "held-out", "count": 20}
    assert told["setting"]["sampling"] == {"method": "euler", "steps": 3, "guidance": 1.5}
    assert told["setting"]["seeds"]["train"] == 1 and told["setting"]["seeds"]["surrogate"] == 7
    assert len(told["setting"]["encoder"]["model_sha256"]) == 64 and told["setting"]["encoder"]["dimensions"] == 64
    assert any("fewer reference images (20) than embedding dimensions (64)" in flag for flag in told["flags"])
    assert any("fewer reference images" in flag for flag in table["flags"].to_pylist()[0])


def test_selections_are_what_their_names_say(done):
    scores = read_folder(done / "shared/scores/last").sort_by([("grand", "descending")])["key"].to_pylist()
    assert kept_keys(done / "cells/grand-high-50-s0/kept.parquet") == frozenset(scores[:50])
    random = [kept_keys(done / f"cells/random-50-s{seed}/kept.parquet") for seed in (0, 1)]
    assert random[0] != random[1]
    held_out = kept_keys(done / "shared/held-out.parquet")
    trained_on = kept_keys(done / "shared/train.parquet")
    assert len(held_out) == 20 and not held_out & trained_on and random[0] | random[1] <= trained_on
    labels = [key.split("/")[0] for key in held_out]
    assert min(map(labels.count, set(labels))) == 2 and len(set(labels)) == 10
    assert set(read_folder(done / "shared/latents")["key"].to_pylist()) == set(trained_on)


def test_one_seed_means_one_noise_and_other_weights(done):
    sampled = [json.loads((done / f"cells/{name}/samples/sample.json").read_text())["plan"] for name in CELLS]
    assert len({plan["seed"] for plan in sampled}) == 1
    assert len({plan["model_sha256"] for plan in sampled}) == len(CELLS)


def test_means_and_spreads(done):
    summary = pq.read_table(done / "summary.parquet").to_pylist()
    for method in ("full", "random", "grand-high"):
        names = [name for name in CELLS if name.startswith(method)]
        values = [result(done, name)["metrics"]["frechet_distance"] for name in names]
        [row] = [row for row in summary if (row["method"], row["metric"]) == (method, "frechet_distance")]
        assert row["mean"] == pytest.approx(statistics.fmean(values), rel=1e-12) and row["seeds"] == 2
        assert row["spread"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-9)
    text = (done / "results.md").read_text()
    assert "### 50% pruned" in text and "| cluster-balanced | 50 |" in text and "±" in text
    assert "Missing" not in text and "### Classes" not in text


def test_differences_to_random_are_of_equal_seeds(done):
    rows = {(row["method"], row["metric"]): row for row in pq.read_table(done / "summary.parquet").to_pylist()}
    for method, metric in (("grand-high", "frechet_distance"), ("cluster-balanced", "kernel_distance")):
        values, others = (
            [result(done, f"{name}-50-s{seed}")["metrics"][metric] for seed in (0, 1)] for name in (method, "random")
        )
        row, expected = rows[method, metric], ttest_rel(values, others)
        assert row["minus_random"] == pytest.approx(values[0] / 2 + values[1] / 2 - sum(others) / 2, abs=1e-9)
        assert row["minus_random"] / row["minus_random_error"] == pytest.approx(expected.statistic, rel=1e-9)
        low, high = expected.confidence_interval(0.95)
        assert row["minus_random_interval"] == pytest.approx((high - low) / 2, rel=1e-9)
        assert row["minus_random_seeds"] == 2
    for method in ("full", "random"):  # of no ratio, and the baseline itself
        assert rows[method, "precision"]["minus_random"] is None
    text = (done / "results.md").read_text()
    assert "#### Difference to random selection at 50%" in text and "Mean over 2 seeds of the difference" in text
    assert text.count("| grand-high |") == 2


def test_any_order_and_any_number_of_processes(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    some = diffprune.sweep(tiny, out, cells=[CELLS[6], "2"])
    assert some["run"] == [CELLS[6], CELLS[2]] and "page" not in some and not (out / "results.parquet").exists()
    rest = diffprune.sweep(tiny, out, cells=list(reversed(CELLS)), jobs=2)
    assert sorted(rest["run"]) == sorted(set(CELLS) - {CELLS[6], CELLS[2]}) and rest["left"] == []
    for name in ("results.parquet", "summary.parquet", "results.md", "metrics.png", "samples-50.png", "sweep.html"):
        assert (out / name).read_bytes() == (done / name).read_bytes(), name


def test_a_killed_sweep_goes_on(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    child = subprocess.Popen([sys.executable, "-m", "diffprune", "sweep", tiny, "-o", out], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (out / "cells" / CELLS[1] / "model").is_dir() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    finished = [name for name in CELLS if (out / "cells" / name / "result.json").is_file()]
    assert CELLS[0] in finished and len(finished) < len(CELLS)
    report = diffprune.sweep(tiny, out)
    assert sorted(report["run"] + finished) == sorted(CELLS)
    assert (out / "results.parquet").read_bytes() == (done / "results.parquet").read_bytes()


def test_a_grid_may_grow_and_nothing_else_may_change(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    shutil.copytree(done / "cells", out / "cells")
    more = changed(tiny, tmp_path / "more.toml", ('methods = ["random",', 'methods = ["random", "moso-high",'))
    assert diffprune.sweep(more, out)["run"] == ["moso-high-50-s0", "moso-high-50-s1"]
    assert "precision" not in json.loads((out / "sweep.json").read_text())["config"]["sample"]  # as of old
    other = changed(tiny, tmp_path / "other.toml", ("guidance = 1.5", 'guidance = 2.5\nprecision = "bf16"'))
    with pytest.raises(ResumeError, match=r"guidance was 1\.5, is now 2\.5; sample\.precision was None, is now 'bf16'"):
        diffprune.sweep(other, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").write_text("")
    with pytest.raises(ResumeError, match="holds other files"):
        diffprune.sweep(tiny, tmp_path / "full")


def test_samples_that_somebody_removed_are_not_shown(tiny, done, tmp_path):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    for cell in ("full-s0", "random-50-s0", "random-50-s1"):  # the plan beside them stays
        (out / "cells" / cell / "samples/samples-000000.tar").unlink()
    diffprune.sweep(tiny, out)
    assert (out / "results.md").read_bytes() == (done / "results.md").read_bytes()
    strips = [(root / "sweep.html").read_text().count("generated by the model trained on") for root in (done, out)]
    assert strips[1] == strips[0] - 1  # full data's is now its other seed's


def test_the_page_says_of_how_many_seeds_and_of_which_cells_it_is(tiny, done, tmp_path):
    out = Path(shutil.copytree(done, tmp_path / "out"))
    settings = load_sweep(tiny)
    for cell, flag in (("full-s1", "no held-out images"), ("full-s0", "no held-out images")):
        told = result(out, cell)
        told["flags"].append(flag)
        told["setting"]["memorization_baseline"] = "what the selection left out"
        (out / "cells" / cell / "result.json").write_text(json.dumps(told))
    (out / "cells/random-50-s0/result.json").unlink()
    write_results(settings, out)
    text = (out / "sweep.html").read_text()
    assert "Means over 1 to 2 seeds" in text and "deviation over 1 to 2 seeds" in text
    assert "Mean over 1 seed of the difference" in text and "One seed has no interval" in text
    assert ">random, seed 1</span>" in text and "noise and class</h3>" in text
    assert "near copies are judged by what the selection left out, which differs from method to method" in text
    assert "near copies are judged" not in (done / "sweep.html").read_text()
    assert "Note: full: no held-out images." in text and "Note: fewer reference images" in text
    whole = (done / "sweep.html").read_text()
    assert "Means over 2 seeds" in whole and "noise and class, seed 0</h3>" in whole and ">random</span>" in whole
    assert "Real images" in whole and f"{result(done, 'full-s0')['real']['vendi_score']:.3f}" in whole
    assert "| real images | |" in (done / "results.md").read_text()


def test_a_cell_that_fails_leaves_the_others(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    strict = changed(
        tiny,
        tmp_path / "strict.toml",
        ('"grand-high", "cluster-balanced"]', '"strict"]\nfull = false'),
        ("prune = [0.5]", "prune = [0.05]"),
    )
    strict.write_text(strict.read_text() + '\n[methods.strict]\norder = "balanced"\n')
    with pytest.raises(DiffpruneError, match=r"2 of 4 cells failed .strict-5-s0: balanced: 95 samples asked for"):
        diffprune.sweep(strict, out)
    assert pq.read_table(out / "results.parquet")["name"].to_pylist() == ["random-5-s0", "random-5-s1"]
    assert "Missing, 2 cells: strict-5-s0, strict-5-s1" in (out / "results.md").read_text()
    assert "2 cells are not done" in (out / "sweep.html").read_text()


def test_of_a_cell_that_is_done_the_weights_stay_that_were_sampled_from(done, tmp_path):
    model = done / "cells" / "random-50-s0" / "model"
    checkpoint = model / "step_00000006"
    assert sorted(path.name for path in checkpoint.iterdir()) == ["ema.safetensors", "state.json"]
    state = read_state(checkpoint)
    assert state["files"]["ema.safetensors"] == result(done, "random-50-s0")["setting"]["model_sha256"]
    diffprune.sample(model, done / "shared" / "vqvae", tmp_path / "samples", count=4, device="cpu")
    shutil.copytree(model, tmp_path / "model")
    config = from_dict("dit", state["config"], "state.json")
    kept = done / "cells" / "random-50-s0" / "kept.parquet"
    with pytest.raises(InputError, match=r"no optimizer\.safetensors; it has ema.* another run with --start-from it"):
        diffprune.train_dit(config, done / "shared" / "latents", tmp_path / "model", kept=kept)
    start = {"kept": kept, "start_from": tmp_path / "model"}
    assert diffprune.train_dit(config, done / "shared" / "latents", tmp_path / "next", **start)["loss"] > 0


def test_a_model_without_a_moving_average_is_sampled_as_it_is_and_its_last_checkpoint_stays(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    plain = changed(tiny, tmp_path / "plain.toml", ("ema_decay = 0.9", "ema_decay = 0.0\ncheckpoint_every = 2"))
    config = load_sweep(plain)
    run_cell(config, list_cells(config)[0], out, "cpu")
    assert [path.name for path in (out / "cells/full-s0/model").glob("step_*")] == ["step_00000006"]
    state = read_state(out / "cells/full-s0/model/step_00000006")
    assert result(out, "full-s0")["setting"]["model_sha256"] == state["files"]["model.safetensors"]
    assert list(state["files"]) == ["model.safetensors"]


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))


def test_the_page_is_one_file_and_escapes_what_it_is_told(tiny, done, tmp_path):
    out = begun(done, tmp_path / "out")
    shutil.copytree(done / "cells", out / "cells")
    named = changed(tiny, tmp_path / "named.toml", ('title = "Tiny"', f"title = {json.dumps(HOSTILE)}"))
    assert diffprune.sweep(named, out)["run"] == []
    text = (out / "sweep.html").read_text()
    assert HOSTILE not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    tags = Tags(text).found
    assert all("onerror" not in attributes for _, attributes in tags)
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 4 and all(source.startswith("data:image/") for source in sources)
    assert not [tag for tag, _ in tags if tag in ("script", "iframe", "object")]
    assert [a["href"] for tag, a in tags if tag == "link"] == ["data:,"]
    assert sum(tag == "svg" for tag, _ in tags) > 10
    for value in ("50 % pruned", "cluster-balanced", "Agreement between scores", "fewer reference images"):
        assert value in text


def test_a_dry_run_measures_and_writes_nothing(tiny, tmp_path):
    out = tmp_path / "out"
    report = diffprune.sweep(tiny, out, jobs=2, dry_run=True)
    assert not out.exists()
    measured = report["measured"]
    assert measured["training"]["steps"] == 6 and measured["training"]["batch"] == 16
    assert measured["sampling"]["evaluations"] == 3 and measured["sampling"]["images"] == 24
    assert 0 < measured["training"]["seconds"] < 5
    assert report["hours_training"] == pytest.approx(6 * measured["training"]["seconds"] / 3600)
    assert report["hours_sampling"] == pytest.approx(3 * measured["sampling"]["seconds"] / 3600)
    assert report["hours_in_all"] == pytest.approx(4 * report["hours_per_cell"])  # 8 cells, two at a time


def test_the_command_line(tiny, done, tmp_path):
    runner = CliRunner()
    out = begun(done, tmp_path / "out")
    listed = runner.invoke(app, ["sweep", str(tiny), "-o", str(out), "--list"])
    assert [line.split()[1] for line in listed.stdout.splitlines()] == CELLS and "done" not in listed.stdout
    one = runner.invoke(app, ["sweep", str(tiny), "-o", str(out), "--cell", "3", "--json"])
    assert one.exit_code == 0, one.output
    assert json.loads(one.stdout)["run"] == [CELLS[3]]
    listed = runner.invoke(app, ["sweep", str(tiny), "-o", str(out), "--list"])
    assert [line.split()[1] for line in listed.stdout.splitlines() if line.endswith("done")] == [CELLS[3]]
    wrong = runner.invoke(app, ["sweep", str(tiny), "-o", str(out), "--cell", "8"])
    assert wrong.exit_code == 1 and "expected a number from 0 to 7, or a name such as 'full-s0'" in wrong.stderr
    shared = runner.invoke(app, ["sweep", str(tiny), "-o", str(out), "--shared-only", "--json"])
    assert "clusters" in json.loads(shared.stdout)["stages"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"grand-high"', '"grand-hihg"', r"sweep.methods: unknown method 'grand-hihg' \(did you mean 'grand-high'\?\)"),
        ('"grand-high"', '"zzz"', r"unknown method 'zzz'; known: random, loss-high, .*cluster-balanced.*k-center"),
        ('"grand-high"', '"full"', "'full' is no pruning method"),
        ('"grand-high"', '"random"', "method 'random' stands in it twice"),
        ("prune = [0.5]", "prune = [0.5, 1.0]", r"sweep\.prune: expected ratios above 0 and below 1"),
        ("prune = [0.5]", "prune = [0.5, 0.5]", r"sweep\.prune: expected each value once"),
        ("seeds = [0, 1]", "seeds = []", r"sweep\.seeds: expected at least one"),
        ("held_out = 0.2", "held_out = 1.0", r"data\.held_out: expected a share from 0 to below 1"),
        ("held_out = 0.2", "", r"evaluate\.reference: expected 'train' where data has neither"),
        ("held_out = 0.2", 'held_out = "a fifth"', r"\[data\]: held_out: expected a float"),
        ("resize = 16", 'shards = "a.tar"', "data: expected source or shards, one of the two"),
        ("resize = 16", "rezise = 16", r"\[data\]: unknown key 'rezise'; known: source, resize"),
        ("[sample]", "[smaple]", "unknown section 'smaple'; known: data, score"),
        ("count = 24", "count = 3", r"sample\.count: expected 4 or more, found 3"),
        ("guidance = 1.5", 'method = "rk4"', "method: expected 'euler' or 'midpoint' or 'heun', found 'rk4'"),
        ("lr = 3e-3", "lr = 3e-3\nseed = 4", r"dit\.train\.seed: expected none"),
        ("depth = 2", "depht = 2", r"\[dit\]: \[model\]: unknown key 'depht'"),
        ("checkpoint_every = 3", "checkpoint_every = 0", "checkpoint_every: expected at least 1, got 0"),
        ("k = 4", "k = 0", r"cluster\.k: expected 1 or more"),
        # Else told once everything before it was trained.
        ("num_heads = 2", "num_heads = 2\nclass_dropout_prob = 0.0", r"sample\.guidance: expected 1 for a model"),
        ("guidance = 1.5", 'labels = "1,12"', r"sample\.labels: expected numbers from 0 to 9, got 12"),
        ("input_size = 4", "input_size = 8", r"dit\.model: expected .* as in the latents \[2, 4, 4\] of "),
        ("seed = 7", 'seed = 7\nema_decay = 0.0\n[score]\nweights = "ema"', r"score\.weights: expected 'model' with"),
        ("checkpoint_every = 3", "checkpoint_every = 6", r"surrogate\.train\.checkpoint_every: expected below 6: mono"),
    ],
)
def test_configs_that_cannot_be(tiny, tmp_path, old, new, message):
    grid = ('"cluster-balanced"', '"cluster-balanced", "monotonicity-high"')
    path = changed(tiny, tmp_path / "bad.toml", grid, (old, new))
    with pytest.raises(InputError, match=message) as error:
        diffprune.sweep(path, tmp_path / "out")
    assert str(error.value).startswith(str(path)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('order = "hihgest"', r"methods\.mine: order: expected one of .*did you mean 'highest'\?"),
        ('by = "grand"', r"methods\.mine: order is missing"),
        ('order = "highest"', r"methods\.mine: by is missing"),
        ('order = "highest"\nby = "grnad"', r"methods\.mine: no column 'grnad'; a sweep makes cluster, distance, el2n"),
        ('order = "highest"\nby = "grand +"', r"methods\.mine: "),
        ('order = "random"\nhow = "well"', r"methods\.mine: unknown key 'how'"),
        ('order = "random"\nper = "label"\nshares = "fair"', r"methods\.mine: shares: expected one of proportional"),
    ],
)
def test_own_methods_that_cannot_be(tiny, tmp_path, table, message):
    (tmp_path / "own.toml").write_text(f"{tiny.read_text()}\n[methods.mine]\n{table}\n")
    with pytest.raises(InputError, match=message):
        load_sweep(tmp_path / "own.toml")


def test_own_methods(tiny, tmp_path):
    path = changed(tiny, tmp_path / "own.toml", ('"grand-high"', '"mine"'))
    path.write_text(path.read_text() + '\n[methods.mine]\norder = "highest"\nby = "grand + -distance & label"\n')
    method = load_sweep(path).method("mine")
    assert method.arguments() == {"order": "highest", "by": "grand + -distance & label"}
    assert method.columns == {"grand", "distance", "label"} and not method.needs_embeddings


@pytest.mark.parametrize(("name", "cells", "k"), [("imagenet", 255, 1000), ("celebahq", 255, 24)])
def test_the_presets_of_the_paper(name, cells, k):
    config = load_sweep(ROOT / f"configs/{name}.toml")
    assert len(list_cells(config)) == cells == 3 * (1 + 4 * len(config.sweep.methods))
    assert config.sweep.prune == (0.25, 0.5, 0.75, 0.9)
    scores = {
        f"{score}-{end}" for score in ("grand", "loss", "el2n", "moso", "monotonicity") for end in ("high", "low")
    }
    clusters = {f"cluster-{part}" for part in ("nearest", "farthest", "middle", "random", "balanced")}
    assert {"random", "drop-clusters"} | scores | clusters <= set(config.sweep.methods)
    model, train = config.dit.model, config.dit.train
    assert (model.hidden_size, model.depth, model.num_heads, model.patch_size) == (1152, 28, 16, 2)
    assert (train.steps, train.batch_size, train.lr, train.ema_decay) == (120_000, 256, 1e-4, 0.9999)
    assert (train.weight_decay, train.warmup_steps, train.timesteps) == (0.0, 0, "uniform")
    assert not model.learn_sigma and (config.score.weights, config.score.draws) == ("ema", 1)  # as in its code
    assert config.surrogate.train.steps == 60_000 and config.surrogate.model == model
    assert config.cluster.k == k and (config.sample.method, config.sample.steps + 1) == ("euler", 60)
    codes = (config.vqvae.model.codebook_size, config.vqvae.model.latent_channels)
    if name == "imagenet":
        assert codes == (16384, 8) and model.num_classes == 1000 and config.sample.guidance == 4.0
    else:
        assert codes == (8192, 4) and model.num_classes == 0 and config.sample.guidance == 1.0
    assert model.in_channels == config.vqvae.model.latent_channels
    looks = _looks(config.sweep.methods)
    assert len({(one["color"], one["dash"]) for one in looks.values()}) == len(config.sweep.methods)
    f8 = load_config(ROOT / f"configs/vqvae-f8-{name}.toml", "vqvae")
    assert config.vqvae == f8 and f8.model.image_size == 8 * model.input_size == 256


def test_a_run_from_a_file_and_what_differs(tiny, tmp_path):
    (tmp_path / "dit.toml").write_text("[model]\ndepth = 3\nnum_heads = 4\n[train]\nlr = 1e-2\nsteps = 99\n")
    path = changed(tiny, tmp_path / "sweep.toml", ("[dit.model]", '[dit]\nconfig = "dit.toml"\n\n[dit.model]'))
    config = load_sweep(path)
    assert (config.dit.model.depth, config.dit.model.num_heads, config.dit.train.steps) == (2, 2, 6)
    less = (("depth = 2\nnum_heads = 2", ""), ("[dit.train]\nsteps = 6", "[dit.train]"))
    config = load_sweep(changed(path, tmp_path / "less.toml", *less))
    assert (config.dit.model.depth, config.dit.model.num_heads, config.dit.train.steps) == (3, 4, 99)
    assert config.dit.train.lr == 3e-3 and config.surrogate.model.depth == 3
    gone = changed(path, tmp_path / "gone.toml", ('"dit.toml"', '"none.toml"'))
    with pytest.raises(InputError, match=r"none\.toml: no such config file"):
        load_sweep(gone)


def test_the_presets_that_run_here():
    config = load_sweep(ROOT / "configs/mnist.toml")
    assert len(list_cells(config)) == 102 and config.sweep.prune == (0.5, 0.75, 0.9)
    skewed = load_sweep(ROOT / "configs/mnist-skew.toml")
    assert skewed.data.skew == 10.0 and skewed.dit.model.num_classes == 0
    assert skewed.vqvae == config.vqvae and skewed.evaluate == config.evaluate
    longer = load_sweep(ROOT / "configs/mnist-longer.toml")
    different = [line.split()[0] for line in differences(config.identity(), longer.identity())]
    assert different == ["dit.train.checkpoint_every", "dit.train.steps"]
    assert longer.dit.train.steps == 4 * config.dit.train.steps


def test_torchrun_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without torchrun"):
        diffprune.sweep(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_storage_is_refused(tiny):
    for out in ("s3://bucket/out", Path("s3://bucket/out")):  # as in a program, and as the command line gives it
        with pytest.raises(InputError, match=r"s3://bucket/out: a sweep's folder cannot be a URL yet"):
            diffprune.sweep(tiny, out, listing=True)


def test_gpus_are_taken_in_turn():
    assert [worker_device("auto", number, 2) for number in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert worker_device("auto", 1, 1) == "auto" and worker_device("auto", 1, 0) == "auto"
    assert worker_device("cuda:1", 0, 4) == "cuda:1" and worker_device("cpu", 1, 4) == "cpu"


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("shared/shared.json", lambda told: [1], r"shared.json: expected the names of finished stages"),
        ("shared/shared.json", lambda told: {"stages": [["pack"]]}, r"shared.json: expected the names of finished"),
        ("cells/full-s0/result.json", lambda told: {**told, "metrics": None}, r"metrics: expected dict, found None"),
        (
            "cells/full-s0/result.json",
            lambda told: {"fingerprint": told["fingerprint"]},
            r"result.json: cell: expected dict, found None; delete its folder and run again",
        ),
    ],
)
def test_changed_files_of_a_sweep_are_told(tiny, done, tmp_path, name, change, message):
    shutil.copytree(done, tmp_path / "out")
    path = tmp_path / "out" / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message):
        diffprune.sweep(tiny, tmp_path / "out")

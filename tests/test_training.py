"""Training does what it says step by step, and a stopped run ends in the bytes of one that was not."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import diffprune
from diffprune import dit_objective, training_log
from diffprune.arrays import ArrayFolder, write_array
from diffprune.checkpoints import load_dit, load_vqvae
from diffprune.config import load_config
from diffprune.decode import load_images
from diffprune.errors import DiffpruneError, InputError, ResumeError
from diffprune.learner import learning_rate
from diffprune.models.dit import DiT
from diffprune.models.vqvae import VQVAE
from diffprune.tables import read_table, table_metadata, write_table
from diffprune.training_order import batch_rows, step_generator

DIT_OVERRIDES = [
    "model.input_size=4",
    "model.hidden_size=16",
    "model.depth=1",
    "model.num_heads=2",
    "train.batch_size=8",
]
VQVAE_OVERRIDES = ["model.image_size=16", "model.base_channels=4", "model.codebook_size=16", "train.batch_size=8"]


def dit_config(*overrides: str):
    return load_config(None, "dit", [*DIT_OVERRIDES, *overrides])


def vqvae_config(*overrides: str):
    return load_config(None, "vqvae", [*VQVAE_OVERRIDES, *overrides])


def same_bytes(one: Path, two: Path) -> bool:
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(two))
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def steps_in(run: Path) -> list[str]:
    return sorted(os.listdir(run))


def logged(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "mfu")} for line in lines]


# Order of samples


@pytest.mark.parametrize("count, batch_size", [(10, 4), (7, 7), (3, 8), (1, 5)])
def test_every_epoch_sees_every_row_once(count, batch_size):
    steps = 3 * count
    rows = torch.cat([batch_rows(count, batch_size, 5, step) for step in range(steps)])
    epochs = rows[: len(rows) // count * count].view(-1, count)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(count).expand_as(epochs))
    if count > 5:
        assert not torch.equal(epochs[0], epochs[1])
        other = torch.cat([batch_rows(count, batch_size, 6, step) for step in range(steps)])
        assert not torch.equal(rows, other)


# What a step does


def test_three_steps_of_a_dit_are_those_of_a_plain_loop(small_run, tmp_path):
    """An independent loop: unfused AdamW, clipping, warm-up and moving average written out."""
    settings = ["lr=0.01", "warmup_steps=2", "weight_decay=0.1", "grad_clip=0.05", "ema_decay=0.3", "seed=9", "steps=3"]
    config = dit_config("model.class_dropout_prob=0.4", *(f"train.{setting}" for setting in settings))
    diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    table, latents = ArrayFolder(small_run.latents).load()
    labels = torch.tensor(table["label"].to_pylist())
    model = DiT(**config.model.__dict__, seed=9)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = [p.detach().double().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1, foreach=False)
    dropped, losses = 0, []
    for step in range(3):
        rows = batch_rows(len(latents), 8, 9, step)
        generator = step_generator(9, "step", step)
        t = torch.rand(8, generator=generator)
        x0 = torch.randn(8, *latents.shape[1:], generator=generator)
        drop = torch.rand(8, generator=generator) < 0.4
        dropped += int(drop.sum())
        x1 = torch.from_numpy(latents)[rows]
        xt = torch.stack([(1 - t[i]) * x0[i] + t[i] * x1[i] for i in range(8)])
        y = torch.tensor([10 if drop[i] else labels[rows[i]] for i in range(8)])
        loss = sum(((model(xt, t, y) - (x1 - x0)) ** 2)[i].mean() for i in range(8)) / 8
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g * min(1.0, 0.05 / norm)
        optimizer.param_groups[0]["lr"] = 0.01 * (0.5, 1, 1)[step]
        optimizer.step()
        decay = min(0.3, (1 + step) / (10 + step))
        ema = [decay * e + (1 - decay) * p.detach().double() for e, p in zip(ema, parameters, strict=True)]
    assert 0 < dropped < 24 and norm > 0.05
    found, state = load_dit(tmp_path / "run", "model")
    averaged, _ = load_dit(tmp_path / "run", "ema")
    trained = [p for p in found.parameters() if p.requires_grad]
    averages = [p for p in averaged.parameters() if p.requires_grad]
    start = DiT(**config.model.__dict__, seed=9)
    moved = [p for p in start.parameters() if p.requires_grad]
    for one, two, average, expected, initial in zip(trained, parameters, averages, ema, moved, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(average.double(), expected, atol=2e-5, rtol=1e-4)
        assert (one - initial).abs().max() > 1e-4
    assert state["lr"] == 0.01 and state["images_seen"] == 24 and state["total_steps"] == 3
    assert logged(tmp_path / "run")[-1]["grad_norm"] == pytest.approx(norm, rel=1e-3)
    assert logged(tmp_path / "run")[-1]["loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_learning_rate_does_not_know_the_number_of_steps():
    short, long = dit_config("train.steps=5", "train.warmup_steps=3").train, dit_config("train.warmup_steps=3").train
    rates = [learning_rate(short, step) for step in range(5)]
    assert rates == [learning_rate(long, step) for step in range(5)]
    assert rates == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3, 1e-3])


def test_both_models_learn(small_run, tmp_path):
    every = ["train.log_every=1", "train.lr=0.003"]
    diffprune.train_dit(dit_config("train.steps=60", *every), small_run.latents, tmp_path / "dit")
    diffprune.train_vqvae(vqvae_config("train.steps=60", *every), small_run.shards, tmp_path / "vqvae")
    for run, measure, share in (("dit", "loss", 0.8), ("vqvae", "reconstruction_error", 0.6)):
        values = [line[measure] for line in logged(tmp_path / run)]
        assert np.mean(values[-10:]) < share * np.mean(values[:10]), run
    assert logged(tmp_path / "vqvae")[-1]["code_perplexity"] > 4


def test_a_step_of_a_vqvae_moves_its_codebook_by_its_batch(small_run, tmp_path):
    config = vqvae_config("train.steps=1", "train.seed=4")
    diffprune.train_vqvae(config, small_run.shards, tmp_path / "run")
    found, _ = load_vqvae(tmp_path / "run")
    _, images = load_images(small_run.shards, size=16, channels=1)
    expected = VQVAE(config.model, seed=4)
    batch = torch.from_numpy(images)[batch_rows(120, 8, 4, 0)].float() / 127.5 - 1
    output = expected(batch)
    expected.update_codebook(output.latents, output.codes, step_generator(4, "step", 0))
    torch.testing.assert_close(found.codebook, expected.codebook)
    torch.testing.assert_close(found.code_counts, expected.code_counts)


def test_latent_scale_makes_the_latents_standard(small_run, tmp_path):
    diffprune.train_vqvae(vqvae_config("train.steps=3"), small_run.shards, tmp_path / "run")
    model, _ = load_vqvae(tmp_path / "run")
    _, images = load_images(small_run.shards, size=16, channels=1)
    with torch.inference_mode():
        latents = model.encode(torch.from_numpy(images).float() / 127.5 - 1).double()
    assert latents.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_bfloat16_is_used_where_asked_for(small_run, tmp_path):
    report = diffprune.train_dit(
        dit_config("train.steps=2", "train.precision=bfloat16"), small_run.latents, tmp_path / "low"
    )
    assert report["precision"] == "bfloat16" and np.isfinite(report["loss"])
    report = diffprune.train_dit(dit_config("train.steps=2"), small_run.latents, tmp_path / "auto")
    if report["device"] == "cpu":
        assert report["precision"] == "float32"
    low, full = (load_file(tmp_path / run / "step_00000002" / "model.safetensors") for run in ("low", "auto"))
    assert all(tensor.dtype == torch.float32 for tensor in low.values())
    assert any(not torch.equal(low[name], full[name]) for name in low)


# Stop and go on


@pytest.mark.parametrize("kind", ["dit", "vqvae"])
def test_ten_steps_are_five_and_five(small_run, tmp_path, kind):
    def train(run: str, *overrides: str) -> dict:
        common = ["train.log_every=2", "train.warmup_steps=7", "train.device=cpu", *overrides]
        if kind == "dit":
            return diffprune.train_dit(dit_config(*common), small_run.latents, tmp_path / run)
        return diffprune.train_vqvae(vqvae_config(*common), small_run.shards, tmp_path / run)

    whole = train("whole", "train.steps=10")
    train("parts", "train.steps=5")
    between = tmp_path / "parts" / "step_00000005"
    assert not same_bytes(between, tmp_path / "whole" / "step_00000010")
    rest = train("parts", "train.steps=10")
    assert (whole["first_step"], rest["first_step"]) == (0, 5)
    names = ["model.safetensors", "optimizer.safetensors", "state.json"] + ["ema.safetensors"] * (kind == "dit")
    assert steps_in(tmp_path / "whole" / "step_00000010") == sorted(names)
    assert same_bytes(tmp_path / "parts" / "step_00000010", tmp_path / "whole" / "step_00000010")
    assert [line["step"] for line in logged(tmp_path / "parts")] == [2, 4, 5, 6, 8, 10]
    assert [line for line in logged(tmp_path / "parts") if line["step"] != 5] == logged(tmp_path / "whole")
    done = train("parts", "train.steps=10")
    assert done["first_step"] == 10 and done["loss"] is None
    assert done["checkpoint"] == str(tmp_path / "parts" / "step_00000010")


def test_ctrl_c_leaves_finished_checkpoints_and_the_next_run_ends_the_same(small_run, tmp_path, monkeypatch):
    config = dit_config("train.steps=6", "train.checkpoint_every=2", "train.log_every=1", "train.device=cpu")
    diffprune.train_dit(config, small_run.latents, tmp_path / "whole")
    real, calls = dit_objective.velocity_loss, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(dit_objective, "velocity_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffprune.train_dit(config, small_run.latents, tmp_path / "cut")
    assert steps_in(tmp_path / "cut") == ["log.jsonl", "loss.png", "step_00000002", "step_00000004"]
    assert [line["step"] for line in logged(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    with open(tmp_path / "cut" / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo')  # a line cut short
    report = diffprune.train_dit(config, small_run.latents, tmp_path / "cut")
    assert report["first_step"] == 4
    for step in ("step_00000002", "step_00000004", "step_00000006"):
        assert same_bytes(tmp_path / "cut" / step, tmp_path / "whole" / step)
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")


def test_the_log_tells_the_mean_loss_of_its_steps_also_of_a_run_that_was_stopped_among_them(
    small_run, tmp_path, monkeypatch
):
    def train(run: str, *overrides: str) -> None:
        every = ["train.steps=10", "train.checkpoint_every=3", "train.device=cpu", *overrides]
        diffprune.train_dit(dit_config(*every), small_run.latents, tmp_path / run)

    train("each", "train.log_every=1")
    train("whole", "train.log_every=4")
    each = [line["loss"] for line in logged(tmp_path / "each")]
    expected = [np.mean(each[:4]), np.mean(each[4:8]), np.mean(each[8:])]
    assert [line["loss"] for line in logged(tmp_path / "whole")] == pytest.approx(expected, rel=1e-12)
    with monkeypatch.context() as patched:
        real, calls = dit_objective.velocity_loss, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 8:  # the checkpoint is of step 6, the last line of step 4
                raise KeyboardInterrupt
            return real(*arguments)

        patched.setattr(dit_objective, "velocity_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train("cut", "train.log_every=4")
    train("cut", "train.log_every=4")
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    assert same_bytes(tmp_path / "cut" / "step_00000010", tmp_path / "whole" / "step_00000010")


def test_a_run_cut_while_it_saves_leaves_no_half_checkpoint(small_run, tmp_path, monkeypatch):
    import diffprune.checkpoints as checkpoints

    real = checkpoints.save_file

    def failing(tensors, path):
        if Path(path).name == "optimizer.safetensors":
            raise KeyboardInterrupt
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", failing)
    with pytest.raises(KeyboardInterrupt):
        diffprune.train_dit(dit_config("train.steps=1"), small_run.latents, tmp_path / "run")
    assert steps_in(tmp_path / "run") == ["log.jsonl"]


def test_a_resume_with_another_config_or_other_data_is_refused(small_run, tmp_path):
    run = tmp_path / "run"
    diffprune.train_dit(dit_config("train.steps=4"), small_run.latents, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for overrides, message in [
        (["train.lr=0.5"], r"step_00000004: of another run \(train.lr: 0.001 there, 0.5 now\)"),
        (["train.seed=3"], r"train.seed: 0 there, 3 now"),
        (["model.depth=2"], r"model.depth: 1 there, 2 now"),
        (["train.precision=bfloat16"], r"train.precision: 'auto' there, 'bfloat16' now"),
        (["train.steps=3"], r"is at step 4 already, train.steps is 3"),
    ]:
        with pytest.raises(ResumeError, match=message):
            diffprune.train_dit(dit_config("train.steps=9", *overrides), small_run.latents, run)
    kept = write_kept(small_run, tmp_path / "kept.parquet", slice(0, 50))
    with pytest.raises(ResumeError, match=r"data.samples: 120 there, 50 now; data.sha256: "):
        diffprune.train_dit(dit_config("train.steps=9"), small_run.latents, run, kept=kept)
    with pytest.raises(ResumeError, match=r"kind: 'dit' there, 'vqvae' now"):
        diffprune.train_vqvae(vqvae_config(), small_run.shards, run)
    with pytest.raises(InputError, match=r"holds checkpoints already, step_00000004 the last"):
        diffprune.train_dit(dit_config("train.steps=9"), small_run.latents, run, resume=False)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    free = ["train.checkpoint_every=1", "train.log_every=3", "train.device=cpu"]
    diffprune.train_dit(dit_config("train.steps=6", *free), small_run.latents, run)
    assert steps_in(run) == ["log.jsonl", "loss.png", "step_00000004", "step_00000005", "step_00000006"]


def test_other_latent_values_under_the_same_keys_are_other_data(small_run, tmp_path):
    latents = Path(shutil.copytree(small_run.latents, tmp_path / "latents"))
    diffprune.train_dit(dit_config("train.steps=1"), latents, tmp_path / "run")
    stem = ArrayFolder(latents).stems[0]
    array = np.array(ArrayFolder(latents).array(stem))
    array[3, 0, 0, 0] += 1
    write_array(latents / f"{stem}.npy", array)
    with pytest.raises(ResumeError, match=r"data.sha256: "):
        diffprune.train_dit(dit_config("train.steps=2"), latents, tmp_path / "run")


def test_latents_of_another_scale_or_vqvae_are_other_data(small_run, tmp_path):
    diffprune.train_dit(dit_config("train.steps=1"), small_run.latents, tmp_path / "run")
    stage = (small_run.latents / "stage.json").read_text()
    metadata = ArrayFolder(small_run.latents).metadata
    for name, other in (("latent_scale", metadata["latent_scale"] * 2), ("model_sha256", "0" * 64)):
        latents = Path(shutil.copytree(small_run.latents, tmp_path / name))
        (latents / "stage.json").write_text(stage.replace(json.dumps(metadata[name]), json.dumps(other)))
        with pytest.raises(ResumeError, match=rf"latents.{name}: .* there, .* now"):
            diffprune.train_dit(dit_config("train.steps=2"), latents, tmp_path / "run")


def test_a_damaged_checkpoint_is_not_gone_on_from(small_run, tmp_path):
    diffprune.train_dit(dit_config("train.steps=1"), small_run.latents, tmp_path / "run")
    path = tmp_path / "run" / "step_00000001" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(InputError, match=r"optimizer.safetensors: damaged"):
        diffprune.train_dit(dit_config("train.steps=2"), small_run.latents, tmp_path / "run")


# Bad input


def write_kept(run, path: Path, rows: slice) -> Path:
    table = ArrayFolder(run.latents).load()[0].select(["key", "shard", "offset", "size"])
    pq.write_table(table.slice(rows.start, rows.stop - rows.start), path)
    return path


def relabel(latents: Path, row: int, label: int | None) -> str:
    """Change the label of a row of the first shard; returns its key."""
    path = latents / f"{ArrayFolder(latents).stems[0]}.parquet"
    table = read_table(path)
    labels = table["label"].to_pylist()
    labels[row] = label
    column = table.column_names.index("label")
    write_table(
        path, table.set_column(column, table.schema.field("label"), pa.array(labels, pa.int64())), table_metadata(table)
    )
    return table["key"][row].as_py()


@pytest.mark.parametrize("label, found", [(10, "label 10"), (-1, "label -1"), (None, "no label")])
def test_a_bad_label_is_told_and_a_selection_without_it_trains(small_run, tmp_path, label, found):
    latents = Path(shutil.copytree(small_run.latents, tmp_path / "latents"))
    key = relabel(latents, 20, label)
    with pytest.raises(InputError, match=f"key '{key}': expected a label from 0 to 9, found {found}"):
        diffprune.train_dit(dit_config("train.steps=1"), latents, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    report = diffprune.train_dit(dit_config("train.steps=1", "model.num_classes=0"), latents, tmp_path / "free")
    assert report["images"] == 120
    kept = write_kept(small_run, tmp_path / "kept.parquet", slice(0, 20))
    report = diffprune.train_dit(dit_config("train.steps=4"), latents, tmp_path / "run", kept=kept)
    assert (report["images"], report["images_seen"], report["epochs"]) == (20, 32, 1.6)


def test_data_that_cannot_be_trained_on_are_told(small_run, tmp_path):
    with pytest.raises(InputError, match=r"expected latents \[3, 8, 8\] .*, found \[2, 4, 4\]"):
        diffprune.train_dit(load_config(None, "dit", ["model.in_channels=3"]), small_run.latents, tmp_path / "run")
    kept = write_kept(small_run, tmp_path / "kept.parquet", slice(0, 0))
    with pytest.raises(InputError, match=r"kept.parquet: expected samples to train on, found none"):
        diffprune.train_dit(dit_config(), small_run.latents, tmp_path / "run", kept=kept)
    with pytest.raises(InputError, match="expected images to train on, found 0 samples"):
        diffprune.train_vqvae(vqvae_config(), small_run.shards, tmp_path / "run", kept=kept)
    with pytest.raises(InputError, match="expected latents, found embeddings"):
        diffprune.train_dit(dit_config(), small_run.embeddings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_image_is_left_out_and_counted(small_run, tmp_path):
    shards = Path(shutil.copytree(small_run.shards, tmp_path / "shards"))
    from diffprune.shards import index_shard

    shard = sorted(shards.glob("*.tar"))[1]
    image = index_shard(shard).samples[2].images()[0]
    data = bytearray(shard.read_bytes())
    data[image.data_offset + image.size // 2] ^= 1
    shard.write_bytes(data)
    report = diffprune.train_vqvae(vqvae_config("train.steps=1"), shards, tmp_path / "run")
    assert (report["images"], report["failed"]) == (119, 1)


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(small_run, tmp_path, monkeypatch):
    keys = ArrayFolder(small_run.latents).load()[0]["key"].to_pylist()
    real, calls = dit_objective.velocity_loss, []

    def poisoned(*arguments):
        calls.append(1)
        losses = real(*arguments)
        return losses * torch.tensor([float("nan") if i == 5 and len(calls) == 3 else 1.0 for i in range(8)])

    monkeypatch.setattr(dit_objective, "velocity_loss", poisoned)
    config = dit_config("train.steps=9", "train.checkpoint_every=2")
    key = keys[batch_rows(120, 8, 0, 2)[5]]
    with pytest.raises(
        DiffpruneError, match=f"stopped at step 3: .* for 1 of 8 samples, keys {key}; checkpoints before"
    ):
        diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    assert steps_in(tmp_path / "run") == ["log.jsonl", "step_00000002", "stopped.json"]
    load_dit(tmp_path / "run")


def test_a_run_that_diverges_stops(small_run, tmp_path):
    with pytest.raises(DiffpruneError, match=r"training stopped at step \d+: .* lower train.lr \(now 1e\+30\)"):
        diffprune.train_dit(dit_config("train.lr=1e30"), small_run.latents, tmp_path / "run")


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(small_run, tmp_path):
    config = dit_config("train.steps=30", "train.batch_size=16")
    report = diffprune.train_dit(config, small_run.latents, tmp_path / "run", dry_run=True)
    assert report["dry_run"] and report["images"] == 120 and report["images_seen"] == 480 and report["epochs"] == 4
    assert report["parameters"] == sum(p.numel() for p in DiT(**config.model.__dict__).parameters())
    assert json.loads(json.dumps(report)) == report
    assert diffprune.train_vqvae(vqvae_config(), small_run.shards, tmp_path / "run", dry_run=True)["images"] == 120
    assert not (tmp_path / "run").exists()
    assert training_log.LOG_FILE == "log.jsonl"

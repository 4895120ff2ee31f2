"""A run that cannot go on leaves its good checkpoints, and says which samples were in the batch."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

import diffprune
from diffprune import dit_objective
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_dit
from diffprune.config import load_config
from diffprune.errors import DiffpruneError, DiskFullError, ResumeError
from diffprune.learner import LEAST_HISTORY
from diffprune.training_order import batch_rows

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=1", "train.batch_size=8", "train.checkpoint_every=10"]


def dit_config(*overrides: str):
    return load_config(None, "dit", [*DIT, *overrides])


def poison(monkeypatch, step: int, factor: list[float]) -> list[int]:
    """Multiply the losses of one step."""
    real, calls = dit_objective.velocity_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return real(*arguments) * (torch.tensor(factor) if len(calls) == step else 1)

    monkeypatch.setattr(dit_objective, "velocity_loss", poisoned)
    return calls


def test_an_exploding_loss_stops_before_the_step_and_names_the_batch(small_run, tmp_path, monkeypatch):
    keys = ArrayFolder(small_run.latents).load()[0]["key"].to_pylist()
    batch = [keys[row] for row in batch_rows(120, 8, 0, 24)]
    config = dit_config("train.steps=40", "train.explosion_factor=4")
    poison(monkeypatch, 25, [1, 1, 1, 300, 1, 9, 1, 1])
    told = rf"step 25: the loss is .*, over 4 times .*, keys {batch[3]}, {batch[5]}.* --start-from the last one"
    with pytest.raises(DiffpruneError, match=told):
        diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert stopped["step"] == 25 and stopped["last_checkpoint"] == str(tmp_path / "run" / "step_00000020")
    assert [sample["key"] for sample in stopped["samples"]] == batch
    found = [sample["loss"] for sample in stopped["samples"]]
    assert max(found) == found[3] > 100 and stopped["loss"] == pytest.approx(sum(found) / 8, rel=1e-5)
    monkeypatch.undo()
    slower = dit_config("train.lr=1e-4", "train.steps=1")  # as it is told to
    with pytest.raises(ResumeError, match=r"train.lr: 0\.001 there, 0\.0001 now"):
        diffprune.train_dit(slower, small_run.latents, tmp_path / "run")
    diffprune.train_dit(slower, small_run.latents, tmp_path / "slower", start_from=tmp_path / "run")
    # The samples were mended: the run goes on from there, as one that never stopped.
    diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    assert not (tmp_path / "run" / "stopped.json").exists()
    diffprune.train_dit(config, small_run.latents, tmp_path / "whole")
    for name in os.listdir(tmp_path / "whole" / "step_00000040"):
        ends = [(tmp_path / run / "step_00000040" / name).read_bytes() for run in ("run", "whole")]
        assert ends[0] == ends[1]


def test_a_high_loss_alone_does_not_stop(small_run, tmp_path, monkeypatch):
    calls = poison(monkeypatch, 25, [300] * 8)
    diffprune.train_dit(dit_config("train.steps=26", "train.explosion_factor=0"), small_run.latents, tmp_path / "never")
    assert len(calls) == 26
    monkeypatch.undo()
    poison(monkeypatch, LEAST_HISTORY, [300] * 8)  # too early to know what is usual
    diffprune.train_dit(dit_config(f"train.steps={LEAST_HISTORY}"), small_run.latents, tmp_path / "early")


def test_samples_that_are_not_finite_stand_in_the_file(small_run, tmp_path, monkeypatch):
    poison(monkeypatch, 2, [1, 1, float("nan"), 1, 1, 1, float("inf"), 1])
    with pytest.raises(DiffpruneError, match="stopped at step 2: the loss is not finite for 2 of 8 samples"):
        diffprune.train_dit(dit_config("train.steps=9"), small_run.latents, tmp_path / "run")
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert [s["loss"] for s in stopped["samples"] if isinstance(s["loss"], str)] == ["nan", "inf"]
    assert stopped["loss"] == "nan" and stopped["last_checkpoint"] is None


def test_weights_that_are_not_finite_are_not_saved(small_run, tmp_path, monkeypatch):
    """The gradient was finite, the step was not: the next loss would tell, the checkpoint comes first."""
    real = torch.optim.AdamW.step

    def broken(self, *arguments):
        real(self, *arguments)
        if len(done := self.param_groups[0].setdefault("done", [])) == 2:
            self.param_groups[0]["params"][0].data[0] = float("inf")
        done.append(1)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    config = dit_config("train.steps=3", "train.checkpoint_every=1")
    with pytest.raises(
        DiffpruneError, match=r"weights are not finite, x_embedder.proj.weight first, and were not saved"
    ):
        diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == ["log.jsonl", "step_00000001", "step_00000002"]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_a_full_disk_in_the_middle_of_a_checkpoint_leaves_the_last_one(small_run, tmp_path, name):
    """The limit on a file's size stands for the full disk: a write fails half-way, in the system call."""
    config = dit_config("train.steps=10")
    diffprune.train_dit(config, small_run.latents, tmp_path / "run")
    last = tmp_path / "run" / "step_00000010"
    before = {path.name: path.read_bytes() for path in last.iterdir()}
    size = len(before[name])
    assert size > 500
    log = Path(tmp_path / "run" / "log.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    smaller = [len(data) for data in before.values() if len(data) < size]
    if name == "optimizer.safetensors":  # the largest: the model's own file fits
        assert max(smaller) < size - 100
        limit = size - 100
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        if name == "state.json":
            with pytest.MonkeyPatch.context() as patch:
                _limit_before_state(patch, size - 100, limits)
                _train_on_a_full_disk(small_run, tmp_path)
        else:
            _train_on_a_full_disk(small_run, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in last.iterdir()} == before
    assert sorted(os.listdir(tmp_path / "run")) == ["log.jsonl", "loss.png", "step_00000010"]
    assert (tmp_path / "run" / "log.jsonl").stat().st_size > log
    load_dit(tmp_path / "run")
    report = diffprune.train_dit(dit_config("train.steps=20"), small_run.latents, tmp_path / "run")
    whole = diffprune.train_dit(dit_config("train.steps=20"), small_run.latents, tmp_path / "whole")
    for file in os.listdir(whole["checkpoint"]):
        assert Path(report["checkpoint"], file).read_bytes() == Path(whole["checkpoint"], file).read_bytes()


def _train_on_a_full_disk(small_run, tmp_path: Path) -> None:
    message = (
        r"step_00000020: could not be written \(.*File too large.*\); it takes 0\.\d MiB, .* checkpoints before it"
    )
    with pytest.raises(DiskFullError, match=message):
        diffprune.train_dit(dit_config("train.steps=20"), small_run.latents, tmp_path / "run")


def _limit_before_state(patch, limit: int, limits: tuple[int, int]) -> None:
    from diffprune import checkpoints

    real = checkpoints.write_json

    def limited(path, value):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        real(path, value)

    patch.setattr(checkpoints, "write_json", limited)

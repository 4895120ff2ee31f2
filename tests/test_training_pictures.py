"""What a run shows of itself: the loss plot, grids of samples, TensorBoard's log."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffprune
from diffprune.config import load_config
from diffprune.errors import InputError
from diffprune.run_pictures import write_loss_plot

DIT = ["model.input_size=4", "model.hidden_size=16", "model.depth=1", "train.batch_size=8", "train.device=cpu"]
DIT += ["train.log_every=1"]


def train(small_run, out: Path, *overrides: str, **options) -> dict:
    return diffprune.train_dit(load_config(None, "dit", [*DIT, *overrides]), small_run.latents, out, **options)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_the_loss_is_plotted_and_a_resumed_run_draws_the_same(small_run, tmp_path):
    train(small_run, tmp_path / "whole", "train.steps=6", "train.checkpoint_every=3")
    train(small_run, tmp_path / "parts", "train.steps=3")
    half = (tmp_path / "parts" / "loss.png").read_bytes()
    train(small_run, tmp_path / "parts", "train.steps=6")
    whole = (tmp_path / "whole" / "loss.png").read_bytes()
    assert half != whole == (tmp_path / "parts" / "loss.png").read_bytes()
    assert pixels(tmp_path / "whole" / "loss.png").shape[:2] == (500, 800)


def test_the_plot_follows_the_log(tmp_path):
    def curve(losses: list[float]) -> np.ndarray:
        lines = [json.dumps({"step": i + 1, "loss": x, "grad_norm": 1.0}) for i, x in enumerate(losses)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        write_loss_plot(tmp_path / "log.jsonl", tmp_path / "loss.png")
        image = pixels(tmp_path / "loss.png").astype(int)
        blue = (image[..., 2] > image[..., 0] + 25)[:370]  # of the upper plot
        columns = np.flatnonzero(blue.any(axis=0))
        return np.array([np.flatnonzero(blue[:, column]).mean() for column in columns])

    falling, rising = curve(list(np.linspace(2, 1, 500))), curve(list(np.linspace(1, 2, 500)))
    assert falling[5] < falling[-5] - 200 and rising[5] > rising[-5] + 200  # rows count downwards
    spike = curve([1.0] * 40 + [1000.0] + [1.0] * 40)
    assert spike.min() < 100 < 250 < np.median(spike)


@pytest.mark.parametrize("more", [[], ["model.num_classes=0"], ["train.ema_decay=0"]])
def test_grids_are_those_of_sample_at_that_step(small_run, tmp_path, more):
    # Large steps: else the output is still near zero, whatever the weights.
    every = ["train.steps=5", "train.sample_every=2", "train.checkpoint_every=2", "train.lr=0.03", *more]
    train(small_run, tmp_path / "run", *every, decode_with=small_run.vqvae)
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step_00000002.png", "step_00000004.png", "step_00000005.png"]
    count = 36 if "model.num_classes=0" in more else 40
    weights = "model" if "train.ema_decay=0" in more else "ema"
    for name in names:
        found = tmp_path / "run" / "samples" / name
        checkpoint = tmp_path / "run" / name.removesuffix(".png")
        diffprune.sample(
            checkpoint, small_run.vqvae, None, count=count, grid=tmp_path / "grid.png", weights=weights, device="cpu"
        )
        assert found.read_bytes() == (tmp_path / "grid.png").read_bytes()
    columns, rows = (10, 4) if count == 40 else (6, 6)
    assert pixels(found).shape == (rows * 18 + 2, columns * 18 + 2)
    assert len({(tmp_path / "run" / "samples" / name).read_bytes() for name in names}) == 3

    if more:
        return
    train(small_run, tmp_path / "parts", *every, "train.steps=3", decode_with=small_run.vqvae)
    train(small_run, tmp_path / "parts", *every, decode_with=small_run.vqvae)
    for name in names:
        parts = tmp_path / "parts" / "samples" / name
        assert parts.read_bytes() == (tmp_path / "run" / "samples" / name).read_bytes()


def test_shards_know_their_vqvae(small_run, tmp_path):
    config = load_config(None, "dit", [*DIT, "train.steps=1", "train.sample_every=9"])
    live = diffprune.LiveLatents(str(small_run.shards), small_run.vqvae, device="cpu")
    diffprune.train_dit(config, live, tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "step_00000001.png").is_file()


def test_grids_that_cannot_be_drawn_are_told_before_the_work(small_run, tmp_path):
    every = ["train.steps=1", "train.sample_every=1"]
    with pytest.raises(InputError, match=r"train.sample_every: needs decode_with, the VQ-VAE of the latents"):
        train(small_run, tmp_path / "run", *every)
    last = sorted(small_run.vqvae.glob("step_*"))[-1]
    other = sorted(small_run.vqvae.glob("step_*"))[0]
    assert other != last
    with pytest.raises(InputError, match=r"the DiT to train: was trained on latents of the VQ-VAE with sha256"):
        train(small_run, tmp_path / "run", *every, decode_with=other)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_number_of_the_log(small_run, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_run, tmp_path / "run", "train.steps=3", "train.tensorboard=true", "train.checkpoint_every=2")
    shutil.rmtree(tmp_path / "run" / "step_00000003")  # as if it had been stopped there
    train(small_run, tmp_path / "run", "train.steps=4", "train.tensorboard=true")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    names = {"loss", "grad_norm", "images_per_second", "mfu"}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    for name in names:
        found = [(event.step, event.value) for event in events.Scalars(f"train/{name}")]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines]


def test_without_its_package_tensorboard_is_refused(small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"needs the package tensorboard .*pip install diffprune\[tensorboard\]"):
        train(small_run, tmp_path / "run", "train.steps=1", "train.tensorboard=true")
    assert not (tmp_path / "run").exists()

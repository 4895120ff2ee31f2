"""Samples are the ODE's solution from each key's own noise, whatever the batches and shards."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffprune
from diffprune.checkpoints import load_dit, load_vqvae, read_state, read_tensors, save_checkpoint
from diffprune.config import DitConfig, DitRun, to_dict
from diffprune.decode import load_images
from diffprune.draws import draw_noise
from diffprune.errors import DiffpruneError, InputError, ResumeError
from diffprune.models.dit import DiT
from diffprune.shards import index_shard


@pytest.fixture(scope="module")
def lively(small_run, tmp_path_factory) -> Path:
    """A DiT for the small run's latents whose weights are all at work: a trained one's still start near zero."""
    return make_checkpoint(small_run, tmp_path_factory.mktemp("lively"))


def make_checkpoint(small_run, folder: Path, scale: float = 0.15, **changes) -> Path:
    trained = read_state(sorted(small_run.surrogate.glob("step_*"))[-1])
    config = DitConfig(**{**trained["config"]["model"], **changes})
    model, generator = DiT(**asdict(config)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * scale
    state = {**trained, "config": to_dict(DitRun(model=config))}
    ema = {name: tensor * 0.9 for name, tensor in model.state_dict().items()}
    return save_checkpoint(folder, state, {"model": model.state_dict(), "ema": ema})


def read(folder: Path) -> tuple[list[str], list[int | None], np.ndarray]:
    table, images = load_images(folder, size=None, channels=1)
    return table["key"].to_pylist(), table["label"].to_pylist(), images.astype(int)


def test_images_are_the_ode_from_each_keys_noise(small_run, lively, tmp_path):
    """Euler and Heun, guided and not, in a plain loop over samples."""
    dit, _ = load_dit(lively)
    vqvae, _ = load_vqvae(small_run.vqvae)
    for method, guidance in (("euler", 1.0), ("heun", 1.0), ("euler", 2.5)):
        out = tmp_path / f"{method}{guidance}"
        settings = {"steps": 3, "method": method, "guidance": guidance, "labels": [4, 1], "seed": 7, "batch_size": 2}
        diffprune.sample(lively, small_run.vqvae, out, count=3, **settings)
        keys, labels, images = read(out)
        assert keys == ["sample-00000000", "sample-00000001", "sample-00000002"] and labels == [4, 1, 4]
        for key, label, image in zip(keys, labels, images, strict=True):

            def velocity(x, t, label=label, guidance=guidance):
                with_label, without = (dit(x, torch.tensor([t]), torch.tensor([y])) for y in (label, 10))
                return without + guidance * (with_label - without)

            x = draw_noise(7, [key], 0, (2, 4, 4))
            with torch.inference_mode():
                for step in range(3):
                    slope = velocity(x, step / 3)
                    if method == "heun":
                        slope = (slope + velocity(x + slope / 3, (step + 1) / 3)) / 2
                    x = x + slope / 3
                expected = ((vqvae.decode(x)[0] + 1) * 127.5).round().numpy()
            assert np.abs(image - expected).max() <= 1


def test_batches_shards_and_count_do_not_change_an_image(small_run, lively, tmp_path):
    diffprune.sample(lively, small_run.vqvae, tmp_path / "a", count=13, steps=2)
    report = diffprune.sample(lively, small_run.vqvae, tmp_path / "b", count=9, steps=2, batch_size=2, shard_size=4)
    assert [Path(path).name for path in report["shards"]] == [f"samples-00000{i}.tar" for i in range(3)]
    (keys, labels, images), (fewer_keys, fewer_labels, fewer) = read(tmp_path / "a"), read(tmp_path / "b")
    assert labels == [i % 10 for i in range(13)]
    assert (fewer_keys, fewer_labels) == (keys[:9], labels[:9])
    assert np.abs(images[:9] - fewer).max() <= 1  # a rounding step
    assert len({image.tobytes() for image in images}) == 13
    diffprune.sample(lively, small_run.vqvae, tmp_path / "c", count=13, steps=2)
    one, two = (tmp_path / run / "samples-000000.tar" for run in ("a", "c"))
    assert one.read_bytes() == two.read_bytes()
    diffprune.sample(lively, small_run.vqvae, tmp_path / "d", count=13, steps=2, seed=1)
    diffprune.sample(lively, small_run.vqvae, tmp_path / "e", count=13, steps=2, weights="model")
    assert np.abs(read(tmp_path / "d")[2] - images).max() > 20
    assert np.abs(read(tmp_path / "e")[2] - images).max() > 20


def test_members_of_a_sample(small_run, lively, tmp_path):
    diffprune.sample(lively, small_run.vqvae, tmp_path / "named", count=2, steps=1, labels="3, 9")
    diffprune.sample(lively, small_run.vqvae, tmp_path / "null", count=2, steps=1, labels="null")
    uids = set()
    for folder, extensions in (("named", ["png", "cls", "json"]), ("null", ["png", "json"])):
        shard = tmp_path / folder / "samples-000000.tar"
        data = shard.read_bytes()
        for sample, label in zip(index_shard(shard).samples, (b"3", b"9"), strict=True):
            members = {m.extension: data[m.data_offset : m.data_offset + m.size] for m in sample.members}
            assert list(members) == extensions
            assert members.get("cls", label) == label
            assert Image.open(io.BytesIO(members["png"])).size == (16, 16)
            uids.add(json.loads(members["json"])["uid"])
    assert len(uids) == 4 and all(len(uid) == 32 and int(uid, 16) for uid in uids)


def test_a_grid_alone_or_beside_the_shards(small_run, lively, tmp_path):
    options = {"steps": 2, "count": 23, "batch_size": 5}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "out", grid=tmp_path / "out" / "grid.png", **options)
    report = diffprune.sample(lively, small_run.vqvae, None, grid=tmp_path / "alone.png", **options)
    assert report["shards"] == [] and report["model_evaluations"] == 2 * 23
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png")).astype(int)
    assert np.array_equal(grid, np.asarray(Image.open(tmp_path / "alone.png")))
    assert grid.shape == (3 * 18 + 2, 10 * 18 + 2)  # a column per class, three rows
    images = read(tmp_path / "out")[2]
    for index in range(23):
        top, left = 2 + index // 10 * 18, 2 + index % 10 * 18
        assert np.abs(grid[top : top + 16, left : left + 16] - images[index, 0]).max() <= 1
    assert np.unique(grid[:2]).tolist() == [64]
    diffprune.sample(lively, small_run.vqvae, None, count=5, steps=1, labels=[1], grid=tmp_path / "square.png")
    assert Image.open(tmp_path / "square.png").size == (3 * 18 + 2, 2 * 18 + 2)


def test_a_stopped_run_goes_on_and_other_settings_are_refused(small_run, lively, tmp_path, monkeypatch):
    from diffprune import sampling

    options = {"count": 9, "steps": 2, "shard_size": 3, "batch_size": 2}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "whole", **options)
    real, calls = sampling.sample_ode, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(sampling, "sample_ode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diffprune.sample(lively, small_run.vqvae, tmp_path / "cut", **options)
    assert sorted(os.listdir(tmp_path / "cut")) == ["sample.json", "samples-000000.tar"]
    report = diffprune.sample(lively, small_run.vqvae, tmp_path / "cut", **options)
    assert (report["written"], report["present"], report["model_evaluations"]) == (2, 1, 6 * 2)
    for path in map(Path, report["shards"]):
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    for changes in ({"seed": 2}, {"steps": 3}, {"labels": "null"}, {"weights": "model"}, {"method": "heun"}):
        with pytest.raises(ResumeError, match="begun with other settings"):
            diffprune.sample(lively, small_run.vqvae, tmp_path / "cut", **{**options, **changes})


def test_another_vqvae_is_refused(small_run, lively, tmp_path):
    other = sorted(small_run.vqvae.glob("step_*"))[0]
    with pytest.raises(InputError, match=r"was trained on latents of the VQ-VAE with sha256 \w+, but .*3 has"):
        diffprune.sample(lively, other, tmp_path / "out", count=1)
    with pytest.raises(InputError, match="expected a checkpoint of a vqvae, found one of a dit"):
        diffprune.sample(lively, lively, tmp_path / "out", count=1)
    assert not (tmp_path / "out").exists()


def test_a_diverged_model_is_told(small_run, lively, tmp_path):
    state = read_state(lively)
    tensors = read_tensors(lively, state, "ema")
    tensors["final_layer.linear.bias"] = torch.full_like(tensors["final_layer.linear.bias"], float("nan"))
    bad = save_checkpoint(tmp_path / "bad", state, {"ema": tensors})
    with pytest.raises(DiffpruneError, match=r"4 of 4 generated latents are not finite, key 'sample-00000000' first"):
        diffprune.sample(bad, small_run.vqvae, tmp_path / "out", count=4, steps=1)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_unconditional_models_and_models_without_a_null_label(small_run, tmp_path):
    free = make_checkpoint(small_run, tmp_path / "free", num_classes=0)
    report = diffprune.sample(free, small_run.vqvae, tmp_path / "out", count=3, steps=1)
    assert report["labels"] == {} and read(tmp_path / "out")[1] == [None, None, None]
    with pytest.raises(InputError, match=r"unconditional: expected uniform or null, got \[1\]"):
        diffprune.sample(free, small_run.vqvae, tmp_path / "no", count=1, labels=[1])
    sure = make_checkpoint(small_run, tmp_path / "sure", class_dropout_prob=0.0)
    for options, message in [({"guidance": 2.0}, "without a null label, got 2.0"), ({"labels": "null"}, "null label")]:
        with pytest.raises(InputError, match=message):
            diffprune.sample(sure, small_run.vqvae, tmp_path / "no", count=1, **options)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 0}, "count: expected at least 1, got 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"shard_size": 0}, "shard_size: expected at least 1"),
        ({"method": "rk4"}, "method: expected euler or heun, got 'rk4'"),
        ({"guidance": float("inf")}, "guidance: expected a finite number, got inf"),
        ({"guidance": 2.0, "labels": "null"}, "guidance: expected 1 with labels null, got 2.0"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"labels": "some"}, "labels: expected uniform, null, or class numbers such as 0,3,7, got 'some'"),
        ({"labels": [3, 10]}, "labels: expected numbers from 0 to 9, got 10"),
        ({"labels": []}, "labels: expected numbers from 0 to 9, got none"),
        ({"weights": "best"}, "weights: expected ema or model, got 'best'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(small_run, lively, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        diffprune.sample(lively, small_run.vqvae, tmp_path / "out", **{"count": 1, **options})
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_how_much_and_writes_nothing(small_run, lively, tmp_path):
    options = {"count": 25, "steps": 5, "method": "heun", "guidance": 2.0, "dry_run": True, "shard_size": 10}
    report = diffprune.sample(lively, small_run.vqvae, tmp_path / "out", grid=tmp_path / "grid.png", **options)
    assert report["model_evaluations"] == (25 + 25) * 5 * 2 * 2 and report["written"] == 3 and report["dry_run"]
    assert report["labels"] == {str(label): 3 if label < 5 else 2 for label in range(10)}
    assert json.loads(json.dumps(report)) == report
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="got neither"):
        diffprune.sample(lively, small_run.vqvae, None, count=1)

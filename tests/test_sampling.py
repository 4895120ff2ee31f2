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
from diffprune.models.vqvae import VQVAE
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
    for method, guidance in (("euler", 1.0), ("heun", 1.0), ("midpoint", 1.0), ("euler", 2.5)):
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
                    if method == "midpoint":
                        slope = velocity(x + slope / 6, (step + 0.5) / 3)
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


@pytest.mark.parametrize("options", [{"steps": 3, "guidance": 2.5}, {"method": "dopri5"}])
def test_bf16_runs_the_model_alone_in_it(small_run, lively, tmp_path, options, monkeypatch):
    from diffprune import generation

    real, seen = generation.guided_velocity, []

    def watched(model, x, t, *arguments):
        velocity = real(model, x, t, *arguments)
        seen.append((x.dtype, velocity.dtype, bool((velocity == velocity.bfloat16()).all())))
        return velocity

    monkeypatch.setattr(generation, "guided_velocity", watched)
    found = []
    for precision in ("float32", "bf16"):
        seen.clear()
        out = tmp_path / precision
        diffprune.sample(lively, small_run.vqvae, out, count=12, precision=precision, **options)
        assert {dtype for *dtypes, _ in seen for dtype in dtypes} == {torch.float32}
        # The model's output has 8 bits, what guidance makes of two of them more.
        assert all(rounded for *_, rounded in seen) == (precision == "bf16" and "guidance" not in options)
        found.append(read(out)[2])
    assert 0 < np.abs(found[0] - found[1]).mean() < 8
    with pytest.raises(ResumeError, match="precision: 'bf16' there, None now"):
        diffprune.sample(lively, small_run.vqvae, tmp_path / "bf16", count=12, **options)
    found = [json.loads((tmp_path / name / "sample.json").read_text())["plan"] for name in ("float32", "bf16")]
    assert [plan["precision"] for plan in found] == [None, "bf16"]
    diffprune.sample(lively, small_run.vqvae, tmp_path / "bf16", count=12, precision="bfloat16", **options)  # the same


def test_where_memory_runs_out_fewer_images_are_decoded_at_once(small_run, lively, tmp_path, monkeypatch):
    decode, seen = VQVAE.decode, []

    def short_of_memory(self, latents):
        seen.append(len(latents))
        if len(latents) > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, latents)

    diffprune.sample(lively, small_run.vqvae, tmp_path / "a", count=45, steps=1)
    monkeypatch.setattr(VQVAE, "decode", short_of_memory)
    diffprune.sample(lively, small_run.vqvae, tmp_path / "b", count=45, steps=1)
    assert seen == [48, 24, 24]
    one, two = (tmp_path / run / "samples-000000.tar" for run in ("a", "b"))
    assert one.read_bytes() == two.read_bytes()


def test_dopri5_is_the_limit_of_small_steps_in_any_batch(small_run, tmp_path):
    """Decoding quantises, so a latent near the edge between two codes may take the other one: most pixels, not all."""
    smooth = make_checkpoint(small_run, tmp_path / "smooth", time_scale=1.0)  # the others turn with every step
    options = {"count": 5, "guidance": 1.5, "seed": 3}
    tight = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    found = diffprune.sample(smooth, small_run.vqvae, tmp_path / "a", **options, **tight)
    diffprune.sample(smooth, small_run.vqvae, tmp_path / "b", **options, **tight, batch_size=2, shard_size=3)
    diffprune.sample(smooth, small_run.vqvae, tmp_path / "c", **options, method="heun", steps=40)
    diffprune.sample(smooth, small_run.vqvae, tmp_path / "d", **options, method="euler", steps=2)
    a, b, exact, rough = (read(tmp_path / name)[2] for name in "abcd")
    assert (np.abs(a - exact) > 2).mean() < 0.05 and (np.abs(rough - exact) > 2).mean() > 0.3
    assert (np.abs(a - b) > 1).mean() < 0.02
    assert found["steps"] is None and found["rtol"] == 1e-4 and found["model_evaluations"] % 2 == 0
    assert 5 * 2 * 10 < found["model_evaluations"] < 5 * 2 * 200
    again = diffprune.sample(smooth, small_run.vqvae, tmp_path / "a", **options, **tight)
    assert again["model_evaluations"] == 0 and again["present"] == 1
    planned = diffprune.sample(smooth, small_run.vqvae, tmp_path / "e", **options, **tight, dry_run=True)
    assert planned["model_evaluations"] is None


def test_guidance_of_the_first_channel_alone(small_run, lively, tmp_path):
    """In a plain loop: the other channel follows the label's velocity."""
    dit, vqvae = load_dit(lively)[0], load_vqvae(small_run.vqvae)[0]
    options = {"steps": 3, "guidance": 4.0, "labels": [6], "seed": 2}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "first", count=1, guidance_channels=1, **options)
    diffprune.sample(lively, small_run.vqvae, tmp_path / "all", count=1, **options)
    x = draw_noise(2, ["sample-00000000"], 0, (2, 4, 4))
    with torch.inference_mode():
        for step in range(3):
            label, null = (dit(x, torch.tensor([step / 3]), torch.tensor([y])) for y in (6, 10))
            v = label.clone()
            v[:, 0] = null[:, 0] + 4 * (label - null)[:, 0]
            x = x + v / 3
        expected = ((vqvae.decode(x) + 1) * 127.5).round().numpy()
    assert np.abs(read(tmp_path / "first")[2] - expected).max() <= 1
    assert np.abs(read(tmp_path / "all")[2] - expected).max() > 20


def test_a_coarse_model_begins_and_the_large_one_ends(small_run, lively, tmp_path):
    small = make_checkpoint(small_run, tmp_path / "small", scale=0.3, depth=1, hidden_size=16)
    options = {"count": 3, "steps": 10, "method": "heun", "guidance": 2.0, "batch_size": 2}
    both = diffprune.sample(
        lively, small_run.vqvae, tmp_path / "both", **options, coarse=small, coarse_until=0.7, grid=tmp_path / "g.png"
    )
    assert (both["coarse_evaluations"], both["model_evaluations"]) == (3 * 2 * 2 * 7, 3 * 2 * 2 * 3)
    models = [load_dit(path)[0] for path in (small, lively)]
    vqvae, images = load_vqvae(small_run.vqvae)[0], read(tmp_path / "both")[2]
    for i in range(3):
        x = draw_noise(0, [f"sample-{i:08d}"], 0, (2, 4, 4))

        def velocity(x, t, model, label=i):
            with_label, without = (model(x, torch.tensor([t]), torch.tensor([y])) for y in (label, 10))
            return without + 2 * (with_label - without)

        with torch.inference_mode():
            for step in range(10):
                slope = velocity(x, step / 10, models[step >= 7])
                x = x + (slope + velocity(x + slope / 10, (step + 1) / 10, models[step >= 7])) / 20
            expected = ((vqvae.decode(x)[0] + 1) * 127.5).round().numpy()
        assert np.abs(images[i] - expected).max() <= 1
    same = {"coarse": lively, "coarse_until": 0.3}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "same", **options, **same)
    diffprune.sample(lively, small_run.vqvae, tmp_path / "one", **options)
    assert np.abs(read(tmp_path / "same")[2] - read(tmp_path / "one")[2]).max() <= 1
    with pytest.raises(ResumeError, match=r"coarse_until: 0\.7 there, 0\.3 now"):
        diffprune.sample(lively, small_run.vqvae, tmp_path / "both", **options, **same)


def test_coarse_models_that_do_not_fit_are_refused(small_run, lively, tmp_path):
    other = make_checkpoint(small_run, tmp_path / "other", num_classes=7)
    foreign_state = {**read_state(lively), "latents": {"model_sha256": "f" * 64}}
    foreign = save_checkpoint(tmp_path / "foreign", foreign_state, {"ema": load_dit(lively)[0].state_dict()})
    for options, message in [
        ({"coarse": other, "coarse_until": 0.5}, "num_classes is 7, but 10 in"),
        ({"coarse": foreign, "coarse_until": 0.5}, "was trained on latents of the VQ-VAE with sha256 f+, but"),
        ({"coarse": lively}, "coarse and coarse_until: expected both or neither"),
        ({"coarse_until": 0.5}, "coarse and coarse_until: expected both or neither"),
        ({"coarse": lively, "coarse_until": 1.0}, "coarse_until: expected a time between 0"),
        ({"coarse": lively, "coarse_until": 0.5, "steps": 1}, "steps: expected at least 2 with a coarse model"),
    ]:
        with pytest.raises(InputError, match=message):
            diffprune.sample(lively, small_run.vqvae, tmp_path / "out", **{"count": 1, **options})
    assert not (tmp_path / "out").exists()


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
    both = diffprune.sample(lively, small_run.vqvae, tmp_path / "out", grid=tmp_path / "out" / "grid.png", **options)
    assert both["model_evaluations"] == 2 * 23, "each image is drawn once"
    few = {**options, "shard_size": 10}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "parts", **few)
    (tmp_path / "parts/samples-000001.tar").unlink()
    rest = diffprune.sample(lively, small_run.vqvae, tmp_path / "parts", grid=tmp_path / "parts.png", **few)
    assert (rest["written"], rest["model_evaluations"]) == (1, 2 * 10), "what is in the shards is not drawn again"
    report = diffprune.sample(lively, small_run.vqvae, None, grid=tmp_path / "alone.png", **options)
    assert report["shards"] == [] and report["model_evaluations"] == 2 * 23
    grid = np.asarray(Image.open(tmp_path / "out" / "grid.png")).astype(int)
    assert np.array_equal(grid, np.asarray(Image.open(tmp_path / "alone.png")))
    parts = np.asarray(Image.open(tmp_path / "parts.png")).astype(int)
    assert np.abs(grid - parts).max() <= 1  # other batches
    assert grid.shape == (3 * 18 + 2, 10 * 18 + 2)  # a column per class, three rows
    images = read(tmp_path / "out")[2]
    for index in range(23):
        top, left = 2 + index // 10 * 18, 2 + index % 10 * 18
        assert np.array_equal(grid[top : top + 16, left : left + 16], images[index, 0])
    assert np.unique(grid[:2]).tolist() == [64]
    diffprune.sample(lively, small_run.vqvae, None, count=5, steps=1, labels=[1], grid=tmp_path / "square.png")
    assert Image.open(tmp_path / "square.png").size == (3 * 18 + 2, 2 * 18 + 2)


def test_a_stopped_run_goes_on_and_other_settings_are_refused(small_run, lively, tmp_path, monkeypatch):
    from diffprune import generation

    options = {"count": 9, "steps": 2, "shard_size": 3, "batch_size": 2}
    diffprune.sample(lively, small_run.vqvae, tmp_path / "whole", **options)
    real, calls = generation.sample_ode, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(generation, "sample_ode", interrupted)
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
        ({"method": "rk4"}, "method: expected euler, midpoint, heun, dopri5, got 'rk4'"),
        ({"method": "dopri5", "steps": 9}, "steps: dopri5 chooses its own"),
        ({"rtol": 1e-4}, "rtol and atol are dopri5's: euler takes steps"),
        ({"method": "dopri5", "atol": 0.0}, "expected rtol >= 0 and atol > 0, got 0.001 and 0.0"),
        ({"guidance_channels": 2}, "guidance_channels: expected 1 to 2, with a guidance other than 1"),
        ({"guidance": 2.0, "guidance_channels": 3}, "guidance_channels: expected 1 to 2"),
        ({"guidance": float("inf")}, "guidance: expected a finite number, got inf"),
        ({"guidance": 2.0, "labels": "null"}, "guidance: expected 1 with labels null, got 2.0"),
        ({"seed": -1}, "seed: expected a number from 0"),
        ({"labels": "some"}, "labels: expected uniform, null, or class numbers such as 0,3,7, got 'some'"),
        ({"labels": [3, 10]}, "labels: expected numbers from 0 to 9, got 10"),
        ({"labels": []}, "labels: expected numbers from 0 to 9, got none"),
        ({"precision": "fp16"}, "precision: expected one of float32, bf16, got 'fp16'"),
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
    assert report["model_evaluations"] == 25 * 5 * 2 * 2 and report["written"] == 3 and report["dry_run"]
    assert report["labels"] == {str(label): 3 if label < 5 else 2 for label in range(10)}
    assert json.loads(json.dumps(report)) == report
    assert os.listdir(tmp_path) == []
    with pytest.raises(InputError, match="got neither"):
        diffprune.sample(lively, small_run.vqvae, None, count=1)

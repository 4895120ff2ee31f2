"""``convert``: published weights score, and those of a velocity generate, as a checkpoint of one's own would."""

from __future__ import annotations

import copy
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_scores import philox_draw, relative, small_dit, small_set
from typer.testing import CliRunner

import diffprune
from diffprune import conversion
from diffprune.checkpoints import list_checkpoints, load_dit, read_state, save_checkpoint
from diffprune.cli.app import app
from diffprune.config import DitConfig, DitRun, to_dict
from diffprune.errors import InputError, ResumeError
from diffprune.gaussian_diffusion import diffuse
from diffprune.memory import BatchSize
from diffprune.models.dit import DiT
from diffprune.scores.batches import Draws, Network
from diffprune.scores.visit import visit
from diffprune.tables import read_folder

CONFIG = DitRun(
    model=DitConfig(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=1, num_heads=2, time_scale=1.0)
)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A state dict as published, without a zero weight."""
    model = DiT(**asdict(CONFIG.model))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    path = tmp_path / "published.pt"
    torch.save(model.state_dict(), path)
    return path


def columns(folder: Path, *names: str) -> list[list]:
    table = read_folder(folder, ["key", *names])
    return [table[name].to_pylist() for name in ("key", *names)]


def test_scores_and_samples_are_those_of_a_checkpoint_of_the_same_weights(small_run, published, tmp_path):
    found = diffprune.convert(
        published, small_run.latents, tmp_path / "run", config=CONFIG, predicts="velocity", steps=400, learning_rate=0.5
    )
    weights = torch.load(published, weights_only=True)
    own = {"kind": "dit", "step": 400, "total_steps": 400, "lr": 0.5, "images_seen": 1, "seed": 0, "data": {}}
    own |= {"config": to_dict(CONFIG), "latents": read_state(list_checkpoints(small_run.surrogate)[0])["latents"]}
    save_checkpoint(tmp_path / "own", own, {"model": weights, "ema": weights})
    assert found["checkpoint"] == str(tmp_path / "run" / "step_00000400")
    assert found["parameters"] == sum(value.numel() for value in weights.values())
    for name in ("run", "own"):
        diffprune.score(small_run.latents, tmp_path / name, tmp_path / f"{name}-scores", methods=["grand", "moso"])
        diffprune.sample(tmp_path / name, small_run.vqvae, tmp_path / f"{name}-samples", count=4, steps=3)
    assert columns(tmp_path / "run-scores", "grand", "moso") == columns(tmp_path / "own-scores", "grand", "moso")
    shards = [next((tmp_path / f"{name}-samples").glob("*.tar")).read_bytes() for name in ("run", "own")]
    assert shards[0] == shards[1]
    diffprune.score(
        small_run.latents, tmp_path / "run", tmp_path / "ema-scores", methods=["grand"], weights="ema"
    )  # it has one set of weights
    assert columns(tmp_path / "ema-scores", "grand") == columns(tmp_path / "own-scores", "grand")


@pytest.mark.parametrize("draws", [1, 3])
def test_scores_by_noise_equal_float64_autograd_one_sample_at_a_time(draws):
    model, (keys, samples) = small_dit(5), small_set(5)
    double = copy.deepcopy(model).double()
    kept = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(step + 1)) for step in range(1000)]
    expected = {name: torch.zeros(len(keys), dtype=torch.float64) for name in ("loss", "el2n", "grand")}
    for i, key in enumerate(keys):
        for draw in range(draws):
            t, noise = philox_draw(3, key, draw, draws, (4, 8, 8))
            step, x0 = int((1 - t) * 1000), torch.from_numpy(noise)[None]
            x = math.sqrt(kept[step]) * samples.latents[i : i + 1].double() + math.sqrt(1 - kept[step]) * x0
            error = double(x, torch.tensor([float(step)]).double(), samples.labels[i : i + 1]) - x0
            gradients = torch.autograd.grad(error.square().mean(), [p for p in double.parameters() if p.requires_grad])
            expected["loss"][i] += error.square().mean().item() / draws
            expected["el2n"][i] += error.square().sum().sqrt().item() / draws
            expected["grand"][i] += sum(g.square().sum() for g in gradients).sqrt() / draws
    network = Network(model, predicts="noise")
    found = visit(network, samples, Draws(3, draws), BatchSize(4), norms=True)
    for name, value in expected.items():
        assert relative(found[name].mean(dim=1), value) < 1e-5, name
    assert network.eager().predicts == "noise"


def test_the_diffusion_is_that_of_the_published_dits():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 1000, 3, 2, generator=generator, dtype=torch.float64)
    steps = torch.arange(1000)
    x, told = diffuse(x1, x0, 1 - (steps.double() + 0.5) / 1000)
    assert torch.equal(told, steps.float())
    assert (x - scheduler.add_noise(x1, x0, steps)).abs().max() < 1e-5  # computed in float32 there
    assert diffuse(x1[:2], x0[:2], torch.tensor([0.0, 1.0]))[1].tolist() == [999, 0]


def test_a_model_of_noise_is_told_in_its_scores_and_does_not_generate(small_run, published, tmp_path):
    diffprune.convert(published, small_run.latents, tmp_path / "run", config=CONFIG, predicts="noise")
    result = diffprune.score(small_run.latents, tmp_path / "run", tmp_path / "scores", methods=["loss", "el2n"])
    assert result["failed"] == 0
    diffprune.convert(published, small_run.latents, tmp_path / "flow", config=CONFIG, predicts="velocity")
    diffprune.score(small_run.latents, tmp_path / "flow", tmp_path / "flow-scores", methods=["loss", "el2n"])
    assert columns(tmp_path / "scores", "loss")[1] != columns(tmp_path / "flow-scores", "loss")[1]
    schema = read_folder(tmp_path / "scores", ["loss", "el2n"]).schema
    assert b"mean((\xce\xb5 \xe2\x88\x92 x0)\xc2\xb2)" in schema.field("loss").metadata[b"meaning"]
    assert "‖ε − x0‖₂" in schema.field("el2n").metadata[b"meaning"].decode()
    with pytest.raises(ResumeError, match="predicts"):  # the same weights' file, another meaning
        diffprune.score(small_run.latents, tmp_path / "flow", tmp_path / "scores", methods=["loss", "el2n"])
    with pytest.raises(InputError, match=r"step_07000000: predicts noise: it can be scored with"):
        diffprune.sample(tmp_path / "run", small_run.vqvae, tmp_path / "samples", count=4)
    with pytest.raises(InputError, match="expected all to predict the same, found noise and velocity"):
        state = json.loads((tmp_path / "flow/step_07000000/state.json").read_text())
        (tmp_path / "flow/step_07000000/state.json").write_text(json.dumps({**state, "step": 5}))
        diffprune.score(small_run.latents, [tmp_path / "run", tmp_path / "flow"], tmp_path / "both", methods=["moso"])


def test_safetensors_by_the_command_line(small_run, published, tmp_path):
    tensors = torch.load(published, weights_only=True)
    save_file(tensors, tmp_path / "published.safetensors")
    (tmp_path / "model.toml").write_text(
        "[model]\n" + "\n".join(f"{name} = {json.dumps(value)}" for name, value in asdict(CONFIG.model).items())
    )
    arguments = ["convert", tmp_path / "published.safetensors", small_run.latents, "-c", tmp_path / "model.toml"]
    arguments += ["--predicts", "velocity", "-o", tmp_path / "run", "--steps", 400, "--json"]
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["predicts"] == "velocity"
    model, state = load_dit(tmp_path / "run")
    assert state["data"]["converted_from"] == "published.safetensors"
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_the_same_again_changes_nothing_and_another_is_refused(small_run, published, tmp_path):
    options = {"config": CONFIG, "predicts": "velocity"}
    first = diffprune.convert(published, small_run.latents, tmp_path / "run", **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert diffprune.convert(published, small_run.latents, tmp_path / "run", **options) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    for changed in ({"predicts": "noise"}, {"steps": 3}, {"learning_rate": 3.0}):
        with pytest.raises(ResumeError, match=r"run: has another checkpoint, step_07000000; give another --out"):
            diffprune.convert(published, small_run.latents, tmp_path / "run", **{**options, **changed})


def test_what_does_not_fit_is_told(small_run, published, tmp_path):
    def convert(weights: Path = published, latents: Path = small_run.latents, **options):
        diffprune.convert(weights, latents, tmp_path / "run", **{"config": CONFIG, "predicts": "velocity", **options})

    def model(**changes) -> DitRun:
        return replace(CONFIG, model=replace(CONFIG.model, **changes))

    with pytest.raises(InputError, match="predicts: expected one of velocity, noise, got 'x0'"):
        convert(predicts="x0")
    with pytest.raises(InputError, match="steps: expected 1 or more, got 0"):
        convert(steps=0)
    with pytest.raises(InputError, match="learning_rate: expected a positive number, got nan"):
        convert(learning_rate=math.nan)
    with pytest.raises(InputError, match=r"model.time_scale: expected 1, .* got 1000"):
        convert(predicts="noise", config=model(time_scale=1000.0))
    with pytest.raises(InputError, match=r"latents: expected latents \[3, 4, 4\].* found \[2, 4, 4\]"):
        convert(config=model(in_channels=3))
    with pytest.raises(InputError, match=r"published.pt: tensor 'blocks.1.attn.qkv.weight' is missing"):
        convert(config=model(depth=2))
    with pytest.raises(InputError, match=r"nowhere.pt: no such file"):
        convert(tmp_path / "nowhere.pt")
    with pytest.raises(InputError, match="embeddings"):
        convert(latents=small_run.embeddings)
    assert not (tmp_path / "run").exists()
    weights = torch.load(published, weights_only=True)
    for name, value, message in (
        ("nan", torch.nan, r"nan.pt: tensor 'x_embedder.proj.weight' has values that are not finite"),
        ("float8", None, r"float8.pt: tensor 'x_embedder.proj.weight': expected float32, float16 or bfloat16, found"),
    ):
        proj = weights["x_embedder.proj.weight"]
        changed = proj.to(torch.float8_e4m3fn) if value is None else torch.full_like(proj, value)
        torch.save({**weights, "x_embedder.proj.weight": changed}, tmp_path / f"{name}.pt")
        with pytest.raises(InputError, match=message):
            convert(tmp_path / f"{name}.pt")
    convert()
    state = json.loads((tmp_path / "run/step_07000000/state.json").read_text())
    (tmp_path / "run/step_07000000/state.json").write_text(json.dumps({**state, "predicts": "x0"}))
    with pytest.raises(InputError, match=r"step_07000000: predicts: expected one of velocity, noise, found 'x0'"):
        diffprune.score(small_run.latents, tmp_path / "run", tmp_path / "scores")


def test_moso_of_another_training_is_not_the_same_run(small_run, published, tmp_path):
    """The weights are the same, but the scores are in proportion to steps and learning rate."""
    options = {"config": CONFIG, "predicts": "velocity"}
    for name, changed in (("a", {}), ("steps", {"steps": 400}), ("rate", {"learning_rate": 3e-4})):
        diffprune.convert(published, small_run.latents, tmp_path / name, **options, **changed)
    diffprune.score(small_run.latents, tmp_path / "a", tmp_path / "scores", methods=["moso"])
    for name in ("steps", "rate"):
        with pytest.raises(ResumeError, match="training"):
            diffprune.score(small_run.latents, tmp_path / name, tmp_path / "scores", methods=["moso"])
    diffprune.score(small_run.latents, tmp_path / "a", tmp_path / "grand", methods=["grand"])
    diffprune.score(small_run.latents, tmp_path / "steps", tmp_path / "grand", methods=["grand"])  # the same there


def test_a_signature_is_not_kept(tmp_path, monkeypatch):
    assert conversion._name("https://host/SiT.pt?X-Signature=secret") == "SiT.pt"
    monkeypatch.chdir(tmp_path)
    assert conversion._name(".") == tmp_path.name


def test_latents_that_do_not_say_what_made_them_are_refused(small_run, published, tmp_path):
    latents = shutil.copytree(small_run.latents, tmp_path / "latents")
    text = (latents / "stage.json").read_text()
    (latents / "stage.json").write_text(text.replace('"model_sha256"', '"model_hash"'))
    with pytest.raises(InputError, match="its metadata lacks model_sha256"):
        diffprune.convert(published, latents, tmp_path / "run", config=CONFIG, predicts="velocity")

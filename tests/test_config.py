"""TOML files, overrides and dataclasses say the same, and what does not fit is told where it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffprune.config import DitRun, TrainConfig, VqvaeRun, from_dict, load_config, section_from_table, to_dict
from diffprune.errors import InputError
from diffprune.models.dit import DiT
from diffprune.sweeping.settings import SampleConfig, ScoreConfig

CONFIGS = Path(__file__).parent.parent / "configs"


def test_defaults_file_and_overrides_in_that_order(tmp_path):
    assert load_config(None, "dit") == DitRun() and load_config(None, "vqvae") == VqvaeRun()
    path = tmp_path / "run.toml"
    path.write_text("[model]\nhidden_size = 60\nnum_heads = 5\n[train]\nlr = 2\nsteps = 7\nprecision = 'float32'\n")
    run = load_config(path, "dit", ["train.steps=9", "model.depth = 3", "train.device=cpu", "train.steps=11"])
    assert (run.model.hidden_size, run.model.num_heads, run.model.depth) == (60, 5, 3)
    assert (run.train.steps, run.train.device, run.train.precision) == (11, "cpu", "float32")
    assert run.train.lr == 2.0 and type(run.train.lr) is float
    assert run.model.patch_size == DitRun().model.patch_size
    vqvae = load_config(None, "vqvae", ["model.channel_multipliers=[1, 2, 4]", 'train.device="cuda:1"'])
    assert vqvae.model.channel_multipliers == (1, 2, 4) and vqvae.train.device == "cuda:1"


def test_overrides_are_checked_together_not_one_by_one():
    run = load_config(None, "dit", ["model.input_size=9", "model.patch_size=3"])
    assert (run.model.input_size, run.model.patch_size) == (9, 3)


def test_either_spelling_of_bfloat16_is_known():
    """Else `TrainConfig(precision="bf16")` trained in float32, without a word."""
    assert load_config(None, "dit", ["train.precision=bf16"]).train.precision == "bfloat16"
    assert TrainConfig(precision="bf16") == TrainConfig(precision="bfloat16")
    for section in (ScoreConfig, SampleConfig):
        assert section_from_table(section, {"precision": "bfloat16"}, "sweep.toml").precision == "bf16"
    with pytest.raises(InputError, match=r"TrainConfig.precision: expected one of auto, float32, bfloat16, got 'fp8'"):
        TrainConfig(precision="fp8")


def test_a_run_survives_json():
    for kind, overrides in [("dit", ["train.lr=0.1"]), ("vqvae", ["model.channel_multipliers=[3, 1]"])]:
        run = load_config(None, kind, overrides)
        saved = json.loads(json.dumps(to_dict(run)))
        assert from_dict(kind, saved, "x") == run
        del saved["train"]["seed"]
        with pytest.raises(InputError, match=r"x: train.seed is missing"):
            from_dict(kind, saved, "x")


@pytest.mark.parametrize("path, kind", [(p, k) for k in ("vqvae", "dit") for p in CONFIGS.glob(f"*{k}*.toml")])
def test_the_files_in_configs_load(path, kind):
    load_config(path, kind)


def test_the_imagenet_config_is_the_published_dit_xl_2():
    run = load_config(CONFIGS / "dit-xl-2-imagenet.toml", "dit")
    with torch.device("meta"):  # the defaults: 4×32×32 latents, 1000 classes and the null label, learned sigma
        assert DiT.from_name("DiT-XL/2").config == run.model
    assert (run.train.batch_size, run.train.lr, run.train.weight_decay, run.train.ema_decay) == (256, 1e-4, 0.0, 0.9999)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[train]\nstep = 1", r"run.toml: \[train\]: unknown key 'step'; known: steps, batch_size"),
        ("[optimizer]\nlr = 1", r"run.toml: unknown section 'optimizer'; known: model, train"),
        ("train = 3", r"run.toml: \[train\]: expected a table, found 3"),
        ("[train]\nsteps = 1.5", r"run.toml: train.steps: expected an int, found 1.5"),
        ("[train]\nsteps = true", r"run.toml: train.steps: expected an int, found True"),
        ("[train]\nlr = 'fast'", r"run.toml: train.lr: expected a float, found 'fast'"),
        ("[train]\nprecision = 'fp8'", r"train.precision: expected 'auto' or 'float32' or 'bfloat16', found 'fp8'"),
        ("[train]\nsteps = 0", r"run.toml: TrainConfig.steps: expected at least 1, got 0"),
        ("[train]\nlr = nan", r"TrainConfig.lr: expected a positive number, got nan"),
        ("[train]\nseed = -1", r"TrainConfig.seed: expected at least 0 and below 2\*\*32, got -1"),
        ("[train]\nlr = 1" + 400 * "0", r"run.toml: train.lr: expected a float, found a number beyond 64 bits"),
        ("[train]\nbatch_size = 0x" + 5000 * "f", r"train.batch_size: expected an int, found a number beyond 64 bits"),
        ("[train]\ngrad_clip = inf", r"TrainConfig.grad_clip: expected at least 0, got inf"),
        ("[model]\nmlp_ratio = 1e308", r"DitConfig.mlp_ratio: expected a positive number, got 1e\+308"),
        ("[train]\nsteps = ", r"run.toml: not a readable TOML file"),
        ("[train]\nsteps = " + 100_000 * "[", r"run.toml: not a readable TOML file"),
        ("[model]\npatch_size = 3", r"run.toml: DitConfig.input_size: expected a multiple of patch_size 3, got 8"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(path, "dit")


@pytest.mark.parametrize(
    "kind, override, message",
    [
        ("dit", "train.stepz=1", r"override 'train.stepz=1': \[train\]: unknown key 'stepz'"),
        ("dit", "steps=1", r"expected section.field=value, such as train.steps=100"),
        ("dit", "train.steps", r"expected section.field=value"),
        ("dit", "train.steps=2\ntrain.lr=3", r"train.steps: expected an int, found '2\\ntrain.lr=3'"),
        ("dit", "train.steps=" + 100_000 * "[", r"train.steps: expected an int, found '\[\[\["),
        ("dit", "train.steps=" + 5000 * "9", r"train.steps: expected an int, found '999"),
        ("vqvae", "model.commitment_weight=inf", r"commitment_weight: expected at least 0, got inf"),
        ("vqvae", "model.depth=4", r"unknown key 'depth'; known: kind, backbone, image_size"),
        ("vqvae", "model.channel_multipliers=[1, 'a']", r"model.channel_multipliers: expected an int, found 'a'"),
        ("vqvae", "model.channel_multipliers=2", r"model.channel_multipliers: expected a list of int, found 2"),
        ("vqvae", "model.channel_multipliers=[]", r"channel_multipliers: expected numbers of at least 1, got \(\)"),
        ("vqvae", "model.image_size=30", r"VqvaeConfig.image_size: expected a multiple of 4, got 30"),
        ("vqvae", "model.in_channels=2", r"VqvaeConfig.in_channels: expected 1 or 3, got 2"),
        ("vqvae", "train.ema_decay=0.9", r"train.ema_decay: expected 0 for a VQ-VAE"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(kind, override, message):
    with pytest.raises(InputError, match=message):
        load_config(None, kind, [override])


def test_halvings_beyond_all_bounds_are_told_at_once():
    with pytest.raises(InputError, match=r"loss.discriminator_layers: 9\d* halvings leave no patch"):
        load_config(None, "vqvae", ["loss.discriminator_layers=999999999999", "loss.adversarial_weight=1"])


def test_missing_files_and_unknown_kinds_are_told(tmp_path):
    with pytest.raises(InputError, match="no such config file"):
        load_config(tmp_path / "none.toml", "dit")
    with pytest.raises(InputError, match="expected vqvae or dit, got 'gan'"):
        load_config(None, "gan")
    with pytest.raises(InputError, match="grad_clip: expected at least 0, got -1"):
        TrainConfig(grad_clip=-1.0)

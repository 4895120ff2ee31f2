"""The f8 backbone, the KL variant, the presets, and training runs of both with all terms of the loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import diffprune
from diffprune import training_images
from diffprune.arrays import ArrayFolder
from diffprune.checkpoints import load_vqvae
from diffprune.config import VqvaeConfig, VqvaeRun, from_dict, load_config, to_dict
from diffprune.decode import load_images
from diffprune.draws import draw_noise
from diffprune.errors import InputError, ResumeError
from diffprune.models.kl import KLAutoencoder, build_autoencoder, normal_divergence
from diffprune.models.vqvae import VQVAE

CONFIGS = Path(__file__).parent.parent / "configs"
TINY = {"backbone": "taming", "image_size": 16, "in_channels": 1, "base_channels": 8, "norm_groups": 4}
TINY |= {"channel_multipliers": (1, 2), "attention_levels": (1,), "latent_channels": 3, "codebook_size": 24}
RUN = ["model.image_size=16", "model.base_channels=8", "model.codebook_size=16", "model.channel_multipliers=[1,2]"]
RUN += ["model.backbone=taming", "model.norm_groups=4", "model.attention_levels=[1]", "train.batch_size=8"]
RUN += ["train.log_every=1", "train.device=cpu", "train.lr=0.002"]
ADVERSARY = ["loss.adversarial_weight=0.5", "loss.discriminator_channels=4", "loss.discriminator_layers=2"]


def train(small_run, out: Path, *overrides: str, **options) -> dict:
    return diffprune.train_vqvae(load_config(None, "vqvae", [*RUN, *overrides]), small_run.shards, out, **options)


def digits(small_run, size: int = 16) -> torch.Tensor:
    _, images = load_images(small_run.shards, size=size, channels=1)
    return torch.from_numpy(images).float() / 127.5 - 1


def logged(run: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (run / "log.jsonl").read_text().splitlines()]


# The models


@pytest.mark.parametrize(
    "name, shape, codes, parameters",
    [("imagenet", (8, 32, 32), 16384, 88_930_587), ("celebahq", (4, 32, 32), 8192, 88_893_615)],
)
def test_the_presets_of_the_published_size(name, shape, codes, parameters):
    run = load_config(CONFIGS / f"vqvae-f8-{name}.toml", "vqvae")
    with torch.device("meta"):
        model = build_autoencoder(run.model)
        images = torch.zeros(1, 3, 256, 256)
        assert model.latent_shape == shape and model.latents(images).shape == (1, *shape)
        assert model.decode(torch.zeros(1, *shape)).shape == images.shape
    assert model.codebook.shape == (codes, shape[0]) and run.model.commitment_weight == 0.25
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [len(level.block) for level in model.encoder.down] == [2] * 4
    assert [len(level.attn) for level in model.encoder.down] == [0, 0, 0, 2]
    assert from_dict("vqvae", json.loads(json.dumps(to_dict(run))), "here") == run


def test_the_kl_model_of_stable_diffusion_has_its_number_of_parameters():
    """83,653,863, as its publishers count."""
    sizes = {"base_channels": 128, "channel_multipliers": (1, 2, 4, 4), "blocks_per_level": 2}
    with torch.device("meta"):
        model = build_autoencoder(
            VqvaeConfig(kind="kl", backbone="taming", image_size=256, in_channels=3, latent_channels=4, **sizes)
        )
    assert isinstance(model, KLAutoencoder) and sum(p.numel() for p in model.parameters()) == 83_653_863


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_initial_weights_depend_on_the_seed_alone(kind):
    state = torch.get_rng_state()
    one, same, other = (build_autoencoder(VqvaeConfig(kind=kind, **TINY), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]) and tensor.isfinite().all(), name
    name = "decoder.up.1.attn.1.q.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_gradients_go_straight_through_the_codebook_of_the_f8_backbone():
    model = build_autoencoder(VqvaeConfig(**TINY, normalize_codes=True), seed=3)
    x = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    output = model(x)
    quantized = model.quantize(output.latents)[0].detach().requires_grad_()
    reconstruction = model.decoder(model.post_quant_conv(quantized))
    torch.testing.assert_close(output.reconstruction, reconstruction)
    (wanted,) = torch.autograd.grad((reconstruction - x).square().mean(), quantized)
    (found,) = torch.autograd.grad(output.reconstruction_error.mean(), output.latents)
    torch.testing.assert_close(found, wanted)
    assert wanted.abs().max() > 0
    torch.testing.assert_close(model.decode(output.latents), reconstruction.clamp(-1, 1))


def test_a_dead_code_comes_alive():
    model = build_autoencoder(VqvaeConfig(**TINY), seed=3)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 3, 8, 8, generator=generator)
    for _ in range(3):
        model.update_codebook(latents, model.quantize(latents)[1], generator)
    model.codebook[5], model.code_sums[5], model.code_counts[5] = 1e3, 0.0, 0.0  # far from all latents
    codes = model.quantize(latents)[1]
    assert not (codes == 5).any()
    model.update_codebook(latents, codes, generator)
    assert (model.quantize(latents)[1] == 5).any()


# The KL variant


def test_the_divergence_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (3 * torch.randn(4, 3, 5, 5, generator=generator).double() for _ in range(2))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(normal_divergence(mean, log_variance), expected)
    assert torch.equal(normal_divergence(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)), torch.zeros(1))


@pytest.mark.parametrize("backbone", ["compact", "taming"])
def test_a_pass_of_a_kl_model_reconstructs_a_draw(backbone):
    tiny = TINY if backbone == "taming" else {"image_size": 16, "latent_channels": 3}
    model = build_autoencoder(VqvaeConfig(**{**tiny, "kind": "kl", "backbone": backbone, "latent_shift": 0.5}), seed=1)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 1, 16, 16, generator=generator), torch.randn(2, *model.latent_shape, generator=generator)
    output = model(x, noise)
    moments = model.quant_conv(model.encoder(x))
    mean, log_variance = moments[:, :3], moments[:, 3:]
    drawn = mean + noise * log_variance.exp().sqrt()
    torch.testing.assert_close(output.latents, drawn)
    torch.testing.assert_close(output.reconstruction, model.decoder(model.post_quant_conv(drawn)))
    torch.testing.assert_close(output.divergence, normal_divergence(mean, log_variance))
    model.latent_scale.fill_(0.25)
    torch.testing.assert_close(model.encode(x), (mean - 0.5) * 0.25)
    torch.testing.assert_close(model.decode((drawn - 0.5) * 0.25), output.reconstruction.clamp(-1, 1))


def test_a_kl_model_learns_and_its_latents_are_means_or_draws_by_key(small_run, tmp_path):
    report = train(small_run, tmp_path / "kl", "model.kind=kl", "train.steps=40", "loss.pixel=l1", "train.flip=true")
    errors = logged(tmp_path / "kl", "reconstruction_error")
    assert np.mean(errors[-10:]) < 0.6 * np.mean(errors[:10])
    assert report["divergence"] > 0 and report["psnr"] > 5 and "codebook_use" not in report
    model, state = load_vqvae(tmp_path / "kl")
    with torch.inference_mode():
        mean, log_variance = model.posterior(digits(small_run))
        drawn_once = diffprune.encode(small_run.shards, tmp_path / "kl", tmp_path / "mean")
        assert drawn_once["samples"] == 120
        assert mean.double().std(correction=0).item() * report["latent_scale"] == pytest.approx(1, abs=1e-4)
        table, means = ArrayFolder(tmp_path / "mean").load()
        torch.testing.assert_close(torch.from_numpy(means), mean * model.latent_scale, atol=2e-3, rtol=2e-3)
        for name, batch_size in (("a", 7), ("b", 120)):
            options = {"posterior_seed": 4, "batch_size": batch_size, "flip_twins": True}
            diffprune.encode(small_run.shards, tmp_path / "kl", tmp_path / name, **options)
        noise = draw_noise(4, table["key"].to_pylist(), 0, model.latent_shape)
        expected = (mean + noise * (log_variance / 2).exp()) * model.latent_scale
    draws = ArrayFolder(tmp_path / "a").load()[1]
    torch.testing.assert_close(torch.from_numpy(draws), expected, atol=2e-3, rtol=2e-3)
    assert np.abs(draws - means).max() > 0.01
    for folder in ("load", "load_twins"):
        one, two = (getattr(ArrayFolder(tmp_path / name), folder)() for name in "ab")
        one, two = (part[1] if isinstance(part, tuple) else part for part in (one, two))
        np.testing.assert_allclose(one, two, atol=2e-3)
    metadata = ArrayFolder(tmp_path / "a").metadata
    assert metadata["posterior_seed"] == 4 and metadata["model_sha256"] == state["sha256"]
    with pytest.raises(ResumeError):  # means into a folder of draws
        diffprune.encode(small_run.shards, tmp_path / "kl", tmp_path / "a", flip_twins=True)
    with pytest.raises(InputError, match=r"posterior_seed: .* is a VQ-VAE, which draws nothing"):
        diffprune.encode(small_run.shards, small_run.vqvae, tmp_path / "c", posterior_seed=1)


# Training


def test_the_f8_backbone_learns_digits_and_reports_how_well(small_run, tmp_path):
    report = train(small_run, tmp_path / "run", "train.steps=40", "train.grad_clip=0")
    errors = logged(tmp_path / "run", "reconstruction_error")
    assert np.mean(errors[-10:]) < 0.5 * np.mean(errors[:10])
    model, _ = load_vqvae(tmp_path / "run")
    x = digits(small_run)
    with torch.inference_mode():
        latents = model.latents(x)
        codes = model.quantize(latents)[1]
        errors = (model.decode(model.encode(x)) - x).double().square().flatten(1).mean(1)
    counts = torch.bincount(codes.flatten(), minlength=16).double()
    shares = counts[counts > 0] / counts.sum()
    assert report["measured_images"] == report["images"] == 120
    assert report["reconstruction_error"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert report["codebook_use"] == (counts > 0).double().mean().item()
    assert report["code_perplexity"] == pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-6)
    assert report["latent_scale"] == pytest.approx(1 / latents.double().std(correction=0).item(), rel=1e-4)
    assert report["frechet_distance"] > 0 and report["frechet_features"] == "pixels, 16×16 averages"
    assert "120 images are fewer than 256 features" in report["frechet_flag"]
    json.dumps(report, allow_nan=False)


def test_images_that_do_not_fit_into_memory_are_decoded_anew_for_the_same_run(small_run, tmp_path, monkeypatch):
    overrides = ["train.steps=3", "train.flip=true"]
    train(small_run, tmp_path / "memory", *overrides)
    monkeypatch.setattr(training_images, "free_bytes", lambda: 0)
    seen, real = [], training_images.StreamedImages.__getitem__

    def counted(self, rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return real(self, rows)

    monkeypatch.setattr(training_images.StreamedImages, "__getitem__", counted)
    train(small_run, tmp_path / "streamed", *overrides)
    assert seen[:3] == [8, 8, 8] and seen[-1] == 120
    for name in ("model.safetensors", "state.json"):
        one, two = (tmp_path / run / "step_00000003" / name for run in ("memory", "streamed"))
        assert one.read_bytes() == two.read_bytes()


def test_an_adversary_begins_at_its_step_and_a_stopped_run_ends_in_the_same_bytes(small_run, tmp_path):
    overrides = [*ADVERSARY, "loss.adversarial_start=2", "loss.pixel=l1", "train.checkpoint_every=2"]
    train(small_run, tmp_path / "without", "train.steps=2", "loss.pixel=l1")
    train(small_run, tmp_path / "whole", "train.steps=5", *overrides)
    train(small_run, tmp_path / "parts", "train.steps=3", *overrides)
    resumed = train(small_run, tmp_path / "parts", "train.steps=5", *overrides)
    assert resumed["first_step"] == 3
    one, two = tmp_path / "whole" / "step_00000005", tmp_path / "parts" / "step_00000005"
    names = sorted(path.name for path in one.iterdir())
    assert "discriminator.safetensors" in names and "discriminator_optimizer.safetensors" in names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    before, plain = (load_file(tmp_path / run / "step_00000002" / "model.safetensors") for run in ("whole", "without"))
    assert all(torch.equal(before[name], plain[name]) for name in plain)
    first, last = (
        load_file(tmp_path / "whole" / f"step_0000000{step}" / "discriminator.safetensors") for step in (2, 5)
    )
    assert any(not torch.equal(first[name], last[name]) for name in first)
    weights = logged(tmp_path / "whole", "adaptive_weight")
    assert weights[:2] == [0, 0] and min(weights[2:]) > 0
    assert logged(tmp_path / "whole", "discriminator_loss")[2] == pytest.approx(1, abs=0.2)  # of verdicts near 0
    (one / "discriminator.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"discriminator.safetensors: damaged"):
        train(small_run, tmp_path / "whole", "train.steps=6", *overrides)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ([*ADVERSARY, "train.accumulate=2"], "train.accumulate: expected 1 with loss.adversarial_weight, got 2"),
        (
            [*ADVERSARY, "loss.discriminator_layers=4"],
            "4 halvings leave no patch of images of 16",
        ),
        (["model.attention_levels=[2]"], r"attention_levels: expected numbers of \[0, 1\]"),
        (["model.norm_groups=3"], "base_channels: expected a multiple of norm_groups 3, got 8"),
        (["model.backbone=compact"], "attention_levels: expected none with backbone compact"),
        (["model.kind=kl", "model.normalize_codes=true"], "normalize_codes: expected false with kind kl"),
        (["loss.lpips_weight=-1"], "lpips_weight: expected at least 0, got -1.0"),
        (["loss.style=1"], r"unknown key 'style'; known: pixel"),
    ],
)
def test_configs_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(None, "vqvae", [*RUN, *overrides])


def test_runs_from_before_there_was_a_choice_still_load():
    sections = to_dict(VqvaeRun())
    del sections["loss"]
    for name in ("kind", "backbone", "attention_levels", "mid_attention", "norm_groups", "z_channels", "latent_shift"):
        del sections["model"][name]
    assert from_dict("vqvae", sections, "state.json") == VqvaeRun()
    names = set(VQVAE(VqvaeRun().model).state_dict())
    assert {"encoder.features.0.weight", "decoder.layers.0.weight", "codebook", "code_sums", "latent_scale"} < names
    assert not any("quant_conv" in name for name in names)

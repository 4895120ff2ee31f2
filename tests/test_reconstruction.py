"""What is said of reconstructions is what they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import diffprune
from diffprune.checkpoints import load_vqvae
from diffprune.cli.app import app
from diffprune.config import VqvaeConfig
from diffprune.decode import load_images
from diffprune.errors import InputError
from diffprune.models.kl import KLAutoencoder
from diffprune.reconstruction import ReconstructionMeasure


def brightness(images: torch.Tensor) -> torch.Tensor:
    """An encoder: mean and spread of each half, of RGB images of 20 pixels."""
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 20, 20)
    halves = images.double().reshape(len(images), -1, 2).transpose(1, 2) / 255
    return torch.cat([halves.mean(-1), halves.std(-1)], dim=1)


brightness.image_size = 20


def reconstructed(run) -> tuple[np.ndarray, np.ndarray, torch.nn.Module]:
    model, _ = load_vqvae(run.vqvae)
    _, images = load_images(run.shards, size=model.image_size, channels=1)
    with torch.inference_mode():
        found = model.decode(model.encode(torch.from_numpy(images).float() / 127.5 - 1))
    return images, found.numpy(), model


def frechet(one: np.ndarray, two: np.ndarray) -> float:
    covariances = [np.cov(part, rowvar=False) for part in (one, two)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0))
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * roots.sum()


def test_what_is_measured(small_run, tmp_path):
    options = {"out": tmp_path / "result.json", "grid": tmp_path / "grid.png", "batch_size": 7}
    result = diffprune.reconstruct(small_run.shards, small_run.vqvae, **options)
    images, found, model = reconstructed(small_run)
    errors = ((images / 127.5 - 1 - found) ** 2).reshape(120, -1).mean(1)
    assert result["images"] == 120 and result["failed"] == 0
    assert result["reconstruction_error"] == pytest.approx(errors.mean(), rel=1e-5)
    assert result["psnr"] == pytest.approx((10 * np.log10(4 / errors)).mean(), rel=1e-5)
    assert result["latent_scale"] == pytest.approx(result["measured_latent_scale"], rel=1e-4)
    assert result["frechet_features"] == "pixels, 16×16 averages" and "fewer than 256" in result["frechet_flag"]
    pixels = [images / 127.5 - 1, np.round((found + 1) * 127.5) / 127.5 - 1]
    assert result["frechet_distance"] == pytest.approx(frechet(*(p.reshape(120, -1) for p in pixels)), rel=1e-3)
    with torch.inference_mode():
        codes = model.quantize(model.latents(torch.from_numpy(images).float() / 127.5 - 1))[1]
    used = codes.unique(return_counts=True)[1].double() / codes.numel()
    assert result["codebook_use"] == len(used) / 32
    assert result["code_perplexity"] == pytest.approx(np.exp(-(used * used.log()).sum().item()))
    assert json.loads((tmp_path / "result.json").read_text())["psnr"] == result["psnr"]
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (10 * 18 + 2, 10 * 18 + 2)  # 50 pairs of 16 pixels
    assert np.array_equal(grid[2:18, 2:18], images[0, 0])
    assert np.array_equal(grid[20:36, 2:18], np.round((found[0, 0] + 1) * 127.5).astype(np.uint8))


def test_an_encoder_sees_images_as_it_wants_them(small_run):
    options = {"encoder": f"{Path(__file__).stem}:brightness", "limit": 60}
    result = diffprune.reconstruct(small_run.shards, small_run.vqvae, **options)
    assert result["images"] == 60 and "brightness" in result["frechet_features"] and "frechet_flag" not in result
    images, found, _ = reconstructed(small_run)
    features = []
    for batch in (images[::2], np.round((found[::2] + 1) * 127.5).astype(np.uint8)):
        colour = [Image.fromarray(image[0]).convert("RGB") for image in batch]
        large = [np.asarray(image.resize((20, 20), Image.Resampling.BICUBIC)) for image in colour]
        rows = brightness(torch.from_numpy(np.stack(large)).permute(0, 3, 1, 2).contiguous())
        features.append((rows / rows.norm(dim=1, keepdim=True)).numpy())
    assert result["frechet_distance"] == pytest.approx(frechet(*features), rel=1e-3, abs=1e-9)


def test_perfect_reconstructions_and_single_images():
    model = KLAutoencoder(VqvaeConfig(kind="kl", image_size=8, latent_channels=1, channel_multipliers=(1,)))
    model.posterior = lambda x: (x, torch.zeros_like(x))
    model.decode_unscaled = lambda x: x
    measure = ReconstructionMeasure(model)
    images = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(measure.add(images), images)
    found = measure.result()
    assert found["reconstruction_error"] == 0 and found["psnr"] is None and found["frechet_distance"] is None
    assert found["divergence"] == pytest.approx((images.double() / 127.5 - 1).square().sum().item() / 2, rel=1e-5)


def test_the_verb(small_run, tmp_path):
    arguments = ["reconstruct", str(small_run.shards), "--vqvae", str(small_run.vqvae), "--limit", "20", "--json"]
    result = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert result["images"] == 20 and result["reconstruction_error"] > 0
    dry = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run"]).stdout)
    assert dry["dry_run"] and dry["images"] == 20 and "psnr" not in dry
    failed = CliRunner().invoke(app, ["reconstruct", str(small_run.shards), "--vqvae", str(tmp_path)])
    assert failed.exit_code == 1 and "no checkpoint in this folder" in failed.stderr
    with pytest.raises(InputError, match="limit: expected at least 1, got 0"):
        diffprune.reconstruct(small_run.shards, small_run.vqvae, limit=0)

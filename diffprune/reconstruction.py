"""How well an autoencoder gives back what it is given: error, Fréchet distance, codebook use, scale of its latents."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffprune.checkpoints import load_vqvae
from diffprune.decode import MAX_PIXELS, Decoding
from diffprune.device import full_float32, pick_device
from diffprune.errors import InputError
from diffprune.evaluation.frechet import frechet_distance
from diffprune.evaluation.gaussians import Gaussian
from diffprune.files import write_json
from diffprune.image_maps import Reading, spread_images
from diffprune.latent_scales import LatentMoments
from diffprune.models.embedders import Embedder, load_embedder
from diffprune.models.kl import KLAutoencoder, normal_divergence
from diffprune.models.vqvae import VQVAE
from diffprune.outputs import PNG, Kind, check_output
from diffprune.progress import progress
from diffprune.shards import ShardSpec, index_shards, show_spec

RECONSTRUCTION_IMAGES = 10_000
# Without an encoder the Fréchet distance is that of pixels, averaged down to this many rows and columns.
PIXEL_SIDE = 16
GRID_PAIRS = 50


def reconstruct(
    shards: ShardSpec,
    vqvae: str | os.PathLike,
    *,
    encoder: str | None = None,
    limit: int = RECONSTRUCTION_IMAGES,
    out: str | os.PathLike | None = None,
    grid: str | os.PathLike | None = None,
    batch_size: int = 32,
    device: str = "auto",
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Encode and decode the images of shards by an autoencoder, and measure what comes back.

    Args:
        vqvae: as in ``encode``: a checkpoint, a run folder, or another program's autoencoder.
        encoder: whose features the Fréchet distance is of, as ``embed``'s ``model`` (``inception@256:PATH`` gives what
            papers call rFID); None takes the pixels, averaged down to 16×16.
        limit: images at most; as many are spread evenly over the shards.
        out: a JSON file for the result.
        grid: a PNG of the first 50 images, each row above its reconstructions.

    Returns: what ``ReconstructionMeasure.result`` gives, and vqvae, model_sha256, latent_scale (None where the file
        has none), device. Images that cannot be decoded are left out; ``failed`` counts them.

    Raises: InputError for a damaged shard, no image that can be decoded, an autoencoder or encoder that cannot be used.
    """
    for name, value in (("limit", limit), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    if out is not None:
        check_output(out, Kind("result of reconstruct", b'"reconstruction_error"'), [vqvae, grid])
    if grid is not None:
        check_output(grid, PNG, [vqvae])
    chosen = pick_device(device)
    model, state = load_vqvae(vqvae, chosen)
    indexes = index_shards(shards)
    asked = min(limit, sum(len(index.samples) for index in indexes))
    scale = model.latent_scale.item()
    head = {"vqvae": state["path"], "model_sha256": state["sha256"]}
    head["latent_scale"] = scale if math.isfinite(scale) else None
    if dry_run:
        return {**head, "images": asked, "dry_run": True}
    measure = ReconstructionMeasure(model, None if encoder is None else load_embedder(encoder, chosen))
    shown: list[np.ndarray] = []
    options = {"size": model.image_size, "channels": model.in_channels, "batch_size": batch_size}
    with progress("reconstruct", total=asked, unit="images") as bar:
        for images in spread_images(indexes, limit, reading=Reading(strict_decode, max_pixels), **options):
            reconstructions = measure.add(torch.from_numpy(images).to(chosen)).cpu().numpy()
            if grid is not None and len(shown) < GRID_PAIRS:
                shown += [np.stack(pair) for pair in zip(images, reconstructions, strict=True)]
            bar.advance(len(images))
    if not measure.images:
        raise InputError(f"{show_spec(shards)}: expected images to reconstruct, found none that can be decoded")
    result = {**head, **measure.result(), "failed": asked - measure.images, "device": str(chosen)}
    if grid is not None:
        _write_pairs(grid, shown[:GRID_PAIRS])
        result["grid"] = str(grid)
    if out is not None:
        write_json(out, result)
        result["out"] = str(out)
    return result


class ReconstructionMeasure:
    """Takes images batch by batch, and says in the end how they were reconstructed."""

    def __init__(self, model: VQVAE | KLAutoencoder, embedder: Embedder | None = None) -> None:
        self.model, self.embedder = model, embedder
        self.images, self.squares, self.decibels, self.nats = 0, 0.0, 0.0, 0.0
        self.moments = LatentMoments()
        self.counts = torch.zeros(model.config.codebook_size, dtype=torch.int64)
        self.gaussians: list[Gaussian] | None = None

    @torch.no_grad()
    def add(self, images: Tensor) -> Tensor:
        """uint8 [B, C, H, W] on the model's device -> their reconstructions, likewise."""
        model, x = self.model, images.float() / 127.5 - 1
        with full_float32():
            if isinstance(model, VQVAE):
                latents = model.latents(x)
                quantized, codes = model.quantize(latents)
                y = model.decoded(quantized).clamp(-1, 1)
                self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts)).cpu()
            else:
                latents, log_variance = model.posterior(x)
                y = model.decode_unscaled(latents)
                self.nats += normal_divergence(latents.double(), log_variance.double()).sum().item()
        self.moments.add(latents)
        errors = (x - y).double().square().flatten(1).mean(dim=1)
        self.squares += errors.sum().item()
        self.decibels += (10 * (4 / errors).log10()).sum().item()  # the peak of [-1, 1] is 2
        reconstructions = ((y + 1) * 127.5).round().to(torch.uint8)
        features = [self._features(batch) for batch in (images, reconstructions)]
        if self.gaussians is None:
            self.gaussians = [Gaussian(block.shape[1], block.device) for block in features]
        for gaussian, block in zip(self.gaussians, features, strict=True):
            gaussian.add(block)
        self.images += len(images)
        return reconstructions

    def result(self) -> dict[str, Any]:
        """Of all images that were added, at least one.

        images; reconstruction_error (mean squared, of pixels in [-1, 1]); psnr (dB, mean over images; None where one
        comes back exactly); frechet_distance of the reconstructions to the images, None for a single image, and
        frechet_features, what of; frechet_flag, where the images are fewer than the features; for a VQ-VAE codebook_use
        (share of the codes that some position is nearest to) and code_perplexity (exp of the entropy of their use), for
        a KL autoencoder divergence (nats per image); measured_latent_scale (1 / standard deviation of the latents'
        elements).
        """
        count = self.images
        decibels = self.decibels / count
        found: dict[str, Any] = {"images": count, "reconstruction_error": self.squares / count}
        found["psnr"] = decibels if math.isfinite(decibels) else None
        real, reconstructed = self.gaussians
        found["frechet_distance"] = None if count < 2 else frechet_distance(reconstructed, real)
        side = min(PIXEL_SIDE, self.model.image_size)
        found["frechet_features"] = self.embedder.head["model"] if self.embedder else f"pixels, {side}×{side} averages"
        if count <= len(real.mean):
            found["frechet_flag"] = f"{count} images are fewer than {len(real.mean)} features: the distance is inflated"
        if isinstance(self.model, VQVAE):
            shares = self.counts.double() / self.counts.sum()
            found["codebook_use"] = (self.counts > 0).double().mean().item()
            found["code_perplexity"] = torch.special.entr(shares).sum().exp().item()
        else:
            found["divergence"] = self.nats / count
        return {**found, "measured_latent_scale": self.moments.scale}

    def _features(self, images: Tensor) -> Tensor:
        """[B, F] of uint8 images."""
        if self.embedder is not None:
            features = self.embedder.embed(_fitted(images, self.embedder)).double()
            if not features.isfinite().all():
                raise InputError(f"{self.embedder.path}: gave features that are not finite, or all zero")
            return features
        side = min(PIXEL_SIDE, self.model.image_size)
        return F.adaptive_avg_pool2d(images.double() / 127.5 - 1, side).flatten(1)


def _fitted(images: Tensor, embedder: Embedder) -> Tensor:
    """uint8 [B, C, H, W] -> as the embedder wants its images."""
    decoding = Decoding(embedder.resize, embedder.channels)
    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    if pixels.shape[-1] != embedder.channels:
        from PIL import Image

        mode, other = ("RGB", "L") if embedder.channels == 3 else ("L", "RGB")
        converted = [np.asarray(Image.fromarray(image.squeeze(), other).convert(mode)) for image in pixels]
        pixels = np.stack(converted).reshape(*pixels.shape[:3], embedder.channels)
    fitted = np.stack([decoding.fit(image) for image in pixels])
    return torch.from_numpy(fitted).permute(0, 3, 1, 2).contiguous().to(images.device)


def _write_pairs(path: str | os.PathLike, pairs: list[np.ndarray]) -> None:
    """Rows of 10 images, each above a row of their reconstructions."""
    from diffprune.sampling import write_grid

    columns = min(10, len(pairs))
    blank = np.zeros_like(pairs[0][0])
    rows = []
    for start in range(0, len(pairs), columns):
        row = pairs[start : start + columns]
        padding = [blank] * (columns - len(row))
        rows += [pair[0] for pair in row] + padding + [pair[1] for pair in row] + padding
    write_grid(path, np.stack(rows), columns)

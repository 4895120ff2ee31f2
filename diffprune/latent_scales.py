"""What latents are multiplied by so that their elements have a standard deviation of 1: measured, never typed in."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from diffprune.checkpoints import load_vqvae
from diffprune.device import full_float32
from diffprune.errors import InputError
from diffprune.foreign_autoencoders import is_foreign_autoencoder
from diffprune.image_maps import Reading, spread_images
from diffprune.models.autoencoder import Autoencoder
from diffprune.shards import ShardSpec, index_shards, show_spec

SCALE_IMAGES = 1000
# Of the scale of a published autoencoder: another batch size or device, and the same latents folder goes on.
SCALE_DIGITS = 4
_BATCH = 16


class LatentMoments:
    """Number, sum and sum of squares of all latents' elements, in float64."""

    def __init__(self) -> None:
        self.number, self.total, self.squares = 0, 0.0, 0.0

    def add(self, latents: Tensor) -> None:
        """Latents [B, D, h, w], not scaled."""
        values = latents.double()
        self.number += values.numel()
        self.total += values.sum().item()
        self.squares += values.square().sum().item()

    @property
    def variance(self) -> float:
        """Over all elements, about their common mean; NaN where there are none."""
        if not self.number:
            return float("nan")
        return self.squares / self.number - (self.total / self.number) ** 2

    @property
    def scale(self) -> float:
        """1 / standard deviation. Raises InputError where it is not a positive number."""
        variance = self.variance
        if not 0 < variance < float("inf"):
            raise InputError(f"expected latents that differ, found a variance of {variance} over {self.number} numbers")
        return variance**-0.5


def missing_latent_scale(
    vqvae: str | os.PathLike, shards: ShardSpec, device: torch.device, reading: Reading
) -> float | None:
    """The scale of an autoencoder whose file has none, measured on these shards; None where it has one."""
    if not is_foreign_autoencoder(vqvae):
        return None
    model, _ = load_vqvae(vqvae, device)
    return None if model.latent_scale.isfinite() else measured_latent_scale(model, shards, device, reading)


def measured_latent_scale(model: Autoencoder, shards: ShardSpec, device: torch.device, reading: Reading) -> float:
    """The scale of this model's latents of 1,000 images spread evenly over the shards, to 4 digits.

    An image that cannot be decoded is left out. Raises InputError where there is none.
    """
    moments = LatentMoments()
    options = {"size": model.image_size, "channels": model.in_channels, "batch_size": _BATCH}
    for images in spread_images(index_shards(shards), SCALE_IMAGES, reading=reading, **options):
        with torch.inference_mode(), full_float32():
            moments.add(model.latents(torch.from_numpy(images).to(device).float() / 127.5 - 1))
    if not moments.number:
        raise InputError(
            f"{show_spec(shards)}: expected images to measure the latents' scale on, found none that can be decoded"
        )
    return float(f"{moments.scale:.{SCALE_DIGITS}g}")

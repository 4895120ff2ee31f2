"""A variational autoencoder (Kingma & Welling 2014, arXiv 1312.6114) with spatial latents, as latent diffusion's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from diffprune.config import VqvaeConfig
from diffprune.models.autoencoder import Autoencoder
from diffprune.models.vqvae import VQVAE

# The logarithm of a variance is held in this range, as published.
LOG_VARIANCE = (-30.0, 20.0)


class KlOutput(NamedTuple):
    """What one training pass gives."""

    reconstruction: Tensor  # [B, C, H, W], not clamped
    reconstruction_error: Tensor  # [B] float32, mean squared
    divergence: Tensor  # [B] float32, nats
    latents: Tensor  # [B, D, h, w], the drawn ones, not scaled


class KLAutoencoder(Autoencoder):
    """An autoencoder whose latents are Gaussians: ``latents`` gives their means, ``posterior`` both parameters."""

    latents_per_channel = 2

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W] images in [-1, 1] -> mean and logarithm of the variance, each [B, D, h, w], not scaled."""
        mean, log_variance = self.encoded(images).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE)

    def latents(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> the posterior's means [B, D, h, w], not scaled."""
        return self.posterior(images)[0]

    def drawn(self, images: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, mean + noise · standard deviation, not scaled; ``noise`` [B, D, h, w]."""
        mean, log_variance = self.posterior(images)
        return mean + noise * (0.5 * log_variance).exp()

    def decode_unscaled(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] unscaled latents -> [B, C, H, W] images in [-1, 1]."""
        return self.decoded(latents).clamp(-1, 1)

    def forward(self, images: Tensor, noise: Tensor) -> KlOutput:
        """One training pass: reconstruct a draw from the posterior."""
        mean, log_variance = self.posterior(images)
        latents = mean + noise * (0.5 * log_variance).exp()
        reconstruction = self.decoded(latents)
        error = (reconstruction - images).float().square().flatten(1).mean(1)
        return KlOutput(reconstruction, error, normal_divergence(mean.float(), log_variance.float()), latents)


def normal_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) ‖ N(0, 1)) summed over all but the first axis, in nats (arXiv 1312.6114, appendix B)."""
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.flatten(1).sum(dim=1)


def build_autoencoder(config: VqvaeConfig, *, seed: int = 0) -> VQVAE | KLAutoencoder:
    """The autoencoder of this kind, its weights drawn from ``seed``; on the meta device without weights."""
    return (VQVAE if config.kind == "vq" else KLAutoencoder)(config, seed=seed)

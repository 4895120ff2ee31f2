"""A vector-quantised autoencoder (van den Oord et al. 2017, arXiv 1711.00937) with an EMA codebook."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.config import VqvaeConfig
from diffprune.kernels import kmeans_assign, kmeans_update
from diffprune.models.autoencoder import Autoencoder

# A code whose average use falls below this share of an even use restarts at a latent of the batch.
DEAD_CODE_SHARE = 0.05


class VqvaeOutput(NamedTuple):
    """What one training pass gives."""

    reconstruction: Tensor  # [B, C, H, W], not clamped
    reconstruction_error: Tensor  # [B] float32, mean squared
    commitment_error: Tensor  # [B] float32, mean squared, not weighted
    latents: Tensor  # [B, D, h, w], not scaled, not quantised
    codes: Tensor  # [B, h, w] int64


class VQVAE(Autoencoder):
    """An autoencoder whose latents are looked up in a codebook before they are decoded.

    Latents are the encoder's output before quantisation times ``latent_scale`` (as the VQ models of latent
    diffusion, arXiv 2112.10752: the diffusion model works on continuous latents, decoding quantises them).
    With ``normalize_codes`` a latent is of unit length at each position, and so is each code.
    """

    latents_per_channel = 1
    codebook: Tensor
    code_sums: Tensor
    code_counts: Tensor

    def __init__(self, config: VqvaeConfig | None = None, *, seed: int = 0) -> None:
        super().__init__(config or VqvaeConfig(), seed=seed)

    def _build(self, config: VqvaeConfig) -> None:
        super()._build(config)
        self.register_buffer("codebook", torch.empty(config.codebook_size, config.latent_channels))
        self.register_buffer("code_sums", torch.empty(config.codebook_size, config.latent_channels))
        self.register_buffer("code_counts", torch.empty(config.codebook_size))

    def latents(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, D, h, w] continuous latents, not scaled."""
        return self._unit(self.encoded(images))

    def decode_unscaled(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] unscaled latents -> [B, C, H, W] images in [-1, 1]; each latent is first quantised."""
        return self.decoded(self.quantize(latents)[0]).clamp(-1, 1)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest code of each position of unscaled ``latents`` [B, D, h, w]: quantised latents, codes [B, h, w]."""
        batch, dim, height, width = latents.shape
        points = self._unit(latents).permute(0, 2, 3, 1).reshape(-1, dim)
        exact = torch.promote_types(points.dtype, torch.float32)
        codes, _ = kmeans_assign(points.detach().to(exact), self.codebook.to(exact))
        codes = codes.long().view(batch, height, width)
        return self.codebook[codes].permute(0, 3, 1, 2).to(latents.dtype), codes

    def forward(self, images: Tensor) -> VqvaeOutput:
        """One training pass with the straight-through estimator; the codebook is not changed by it."""
        latents = self.latents(images)
        quantized, codes = self.quantize(latents)
        reconstruction = self.decoded(latents + (quantized - latents).detach())
        error = (reconstruction - images).float().square().flatten(1).mean(1)
        commitment_error = (latents - quantized).float().square().flatten(1).mean(1)
        return VqvaeOutput(reconstruction, error, commitment_error, latents, codes)

    @torch.no_grad()
    def update_codebook(self, latents: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """Move each code to the moving average of its latents; restart dead ones at a latent of this batch.

        Args:
            latents, codes: of ``forward``.
            generator: a CPU generator that picks where the dead codes restart.
        """
        points = latents.permute(0, 2, 3, 1).reshape(-1, self.config.latent_channels).float()
        size = self.codebook.shape[0]
        sums, counts = kmeans_update(points, codes.flatten().int(), size)
        self.code_counts.lerp_(counts.float(), 1 - self.config.codebook_decay)
        self.code_sums.lerp_(sums.float(), 1 - self.config.codebook_decay)
        even = points.shape[0] / size
        fresh = points[torch.randint(points.shape[0], (size,), generator=generator).to(points.device)]
        dead = self.code_counts < DEAD_CODE_SHARE * even
        self.code_sums.copy_(torch.where(dead[:, None], fresh * even, self.code_sums))
        self.code_counts.masked_fill_(dead, even)
        self.codebook.copy_(self._unit(self.code_sums / self.code_counts[:, None]))

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all weights from ``generator``; the codebook is unused until ``update_codebook`` ran."""
        super().init_weights(generator)
        nn.init.normal_(self.codebook, generator=generator)
        self.codebook.copy_(self._unit(self.codebook))
        self.code_counts.zero_()
        self.code_sums.zero_()

    def _unit(self, vectors: Tensor) -> Tensor:
        """[n, D, ...] at unit length along D if the config says so, else as they are."""
        return F.normalize(vectors, dim=1) if self.config.normalize_codes else vectors

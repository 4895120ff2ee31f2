"""A small vector-quantised autoencoder (van den Oord et al. 2017, arXiv 1711.00937) with an EMA codebook."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.config import VqvaeConfig
from diffprune.errors import InputError
from diffprune.kernels import kmeans_assign, kmeans_update

# A code whose average use falls below this share of an even use restarts at a latent of the batch.
DEAD_CODE_SHARE = 0.05
# Embeddings are latents averaged down to this many rows and columns. On MNIST digits the nearest neighbour by cosine
# has the same label for 96% at 8 (by pixels: 95%), 84% at 4; wider encoder features, pooled to 4, did worse: 92%.
EMBED_SIDE = 8


class VqvaeOutput(NamedTuple):
    """What one training pass gives."""

    reconstruction: Tensor  # [B, C, H, W], not clamped
    reconstruction_error: Tensor  # [B] float32, mean squared
    commitment_error: Tensor  # [B] float32, mean squared, not weighted
    latents: Tensor  # [B, D, h, w], not scaled, not quantised
    codes: Tensor  # [B, h, w] int64


class VQVAE(nn.Module):
    """Images to latents ``2 ** len(channel_multipliers)`` times smaller, and back.

    Latents are the encoder's output before quantisation times ``latent_scale`` (as the VQ models of latent
    diffusion, arXiv 2112.10752: the diffusion model works on continuous latents, decoding quantises them).
    With ``normalize_codes`` a latent is of unit length at each position, and so is each code. ``latent_scale`` is a
    buffer, 1 until ``train_vqvae`` sets it to 1 / std of the training latents.

    Initial weights are drawn from ``seed``; the global generator is left as it was.
    """

    def __init__(self, config: VqvaeConfig | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config = config or VqvaeConfig()
        self.image_size, self.in_channels = config.image_size, config.in_channels
        widths = [config.base_channels, *(config.base_channels * factor for factor in config.channel_multipliers)]
        shape = (config.in_channels, widths, config.blocks_per_level, config.latent_channels)
        device = torch.get_default_device()
        with torch.device("meta"):
            self.encoder = Encoder(*shape)
            self.decoder = Decoder(*shape)
            self.register_buffer("codebook", torch.empty(config.codebook_size, config.latent_channels))
            self.register_buffer("code_sums", torch.empty(config.codebook_size, config.latent_channels))
            self.register_buffer("code_counts", torch.empty(config.codebook_size))
            self.register_buffer("latent_scale", torch.empty(()))
        if device.type != "meta":
            self.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))
            self.to(device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one image's latent."""
        side = self.image_size // 2 ** len(self.config.channel_multipliers)
        return self.config.latent_channels, side, side

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, D, h, w] continuous latents, scaled."""
        return self.latents(images) * self.latent_scale

    def latents(self, images: Tensor) -> Tensor:
        """As ``encode``, not scaled."""
        return self._unit(self.encoder(self._checked(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] scaled latents -> [B, C, H, W] images in [-1, 1]; each latent is first quantised."""
        _check_shape("latents", latents, self.latent_shape)
        quantized, _ = self.quantize(latents / self.latent_scale)
        return self.decoder(quantized).clamp(-1, 1)

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, D * s * s] features for clustering, not normalised; s is at most 8."""
        latents = self.latents(images)
        return F.adaptive_avg_pool2d(latents, min(EMBED_SIDE, latents.shape[-1])).flatten(1)

    def quantize(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest code of each position of unscaled ``latents`` [B, D, h, w]: quantised latents, codes [B, h, w]."""
        batch, dim, height, width = latents.shape
        points = self._unit(latents).permute(0, 2, 3, 1).reshape(-1, dim)
        codes, _ = kmeans_assign(points.detach().float(), self.codebook.float())
        codes = codes.long().view(batch, height, width)
        return self.codebook[codes].permute(0, 3, 1, 2).to(latents.dtype), codes

    def forward(self, images: Tensor) -> VqvaeOutput:
        """One training pass with the straight-through estimator; the codebook is not changed by it."""
        latents = self.latents(images)
        quantized, codes = self.quantize(latents)
        reconstruction = self.decoder(latents + (quantized - latents).detach())
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.codebook, generator=generator)
        self.codebook.copy_(self._unit(self.codebook))
        self.code_counts.zero_()
        self.code_sums.zero_()
        self.latent_scale.fill_(1.0)

    def _unit(self, vectors: Tensor) -> Tensor:
        """[n, D, ...] at unit length along D if the config says so, else as they are."""
        return F.normalize(vectors, dim=1) if self.config.normalize_codes else vectors

    def _checked(self, images: Tensor) -> Tensor:
        _check_shape("images", images, (self.in_channels, self.image_size, self.image_size))
        return images


class Encoder(nn.Module):
    """[B, C, H, W] -> [B, D, h, w]."""

    def __init__(self, in_channels: int, widths: list[int], blocks: int, latent_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
        for previous, width in pairwise(widths):
            layers.append(nn.Conv2d(previous, width, 4, stride=2, padding=1))
            layers.extend(ResidualBlock(width) for _ in range(blocks))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], latent_channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Decoder(nn.Module):
    """[B, D, h, w] -> [B, C, H, W]."""

    def __init__(self, in_channels: int, widths: list[int], blocks: int, latent_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, widths[-1], 3, padding=1)]
        for width, smaller in pairwise(reversed(widths)):
            layers.extend(ResidualBlock(width) for _ in range(blocks))
            layers.append(nn.Conv2d(width, 4 * smaller, 3, padding=1))
            layers.append(nn.PixelShuffle(2))
        layers += [_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], in_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, beside the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            _norm(channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


def _check_shape(what: str, tensor: Tensor, expected: tuple[int, int, int]) -> None:
    if tuple(tensor.shape[1:]) != expected:
        raise InputError(f"expected {what} [B, {', '.join(map(str, expected))}], got {tuple(tensor.shape)}")

"""What a VQ-VAE and a KL autoencoder have in common: images to latents and back, and how latents are scaled."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.config import VqvaeConfig
from diffprune.errors import InputError
from diffprune.models.compact import CompactDecoder, CompactEncoder, init_compact
from diffprune.models.taming import TamingDecoder, TamingEncoder, init_taming

# Embeddings are latents averaged down to this many rows and columns. On MNIST digits the nearest neighbour by cosine
# has the same label for 96% at 8 (by pixels: 95%), 84% at 4; wider encoder features, pooled to 4, did worse: 92%.
EMBED_SIDE = 8


class Autoencoder(nn.Module):
    """Images to latents ``config.downsampling`` times smaller, and back; subclasses say what a latent is.

    A scaled latent is (latent − latent_shift) · latent_scale. ``latent_scale`` is a buffer: ``train_vqvae`` sets it to
    1 / std of the training latents, published models may bring theirs, and NaN stands for not known. Initial weights
    are drawn from ``seed``; the global generator is left as it was.
    """

    latents_per_channel: ClassVar[int]
    """Numbers that the encoder gives for each channel of a latent."""
    latent_scale: Tensor
    encoder: CompactEncoder | TamingEncoder
    decoder: CompactDecoder | TamingDecoder
    quant_conv: nn.Module
    post_quant_conv: nn.Module

    def __init__(self, config: VqvaeConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.image_size, self.in_channels = config.image_size, config.in_channels
        device = torch.get_default_device()
        with torch.device("meta"):
            self._build(config)
            self.register_buffer("latent_scale", torch.empty(()))
        if device.type != "meta":
            self.to_empty(device="cpu").init_weights(torch.Generator().manual_seed(seed))
            self.to(device)

    def _build(self, config: VqvaeConfig) -> None:
        """Add the modules and buffers, on the meta device."""
        out = self.latents_per_channel * config.latent_channels
        if config.backbone == "compact":
            self.encoder, self.decoder = CompactEncoder(config, out), CompactDecoder(config)
            self.quant_conv = self.post_quant_conv = nn.Identity()
            return
        z_channels = config.z_channels or config.latent_channels
        self.encoder = TamingEncoder(config, self.latents_per_channel * z_channels)
        self.quant_conv = nn.Conv2d(self.latents_per_channel * z_channels, out, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, z_channels, 1)
        self.decoder = TamingDecoder(config, z_channels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one image's latent."""
        side = self.image_size // self.config.downsampling
        return self.config.latent_channels, side, side

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the decoder's last convolution."""
        return self.decoder.last_weight

    def encode(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, D, h, w] latents, scaled."""
        return self.scaled(self.latents(images))

    def decode(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] scaled latents -> [B, C, H, W] images in [-1, 1]."""
        _check_shape("latents", latents, self.latent_shape)
        return self.decode_unscaled(latents / self.latent_scale + self.config.latent_shift)

    def scaled(self, latents: Tensor) -> Tensor:
        """Latents as a DiT is trained on them."""
        return (latents - self.config.latent_shift) * self.latent_scale

    def latents(self, images: Tensor) -> Tensor:
        """As ``encode``, not scaled."""
        raise NotImplementedError

    def decode_unscaled(self, latents: Tensor) -> Tensor:
        """As ``decode``, of what ``latents`` gives."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, D * s * s] features for clustering, not normalised; s is at most 8."""
        latents = self.latents(images)
        return F.adaptive_avg_pool2d(latents, min(EMBED_SIDE, latents.shape[-1])).flatten(1)

    def encoded(self, images: Tensor) -> Tensor:
        """[B, C, H, W] images in [-1, 1] -> [B, latents_per_channel * D, h, w]."""
        _check_shape("images", images, (self.in_channels, self.image_size, self.image_size))
        return self.quant_conv(self.encoder(images))

    def decoded(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] latents, as the decoder takes them -> [B, C, H, W] images, not clamped."""
        return self.decoder(self.post_quant_conv(latents))

    def init_weights(self, generator: torch.Generator) -> None:
        """Initialise all weights from ``generator``."""
        init = init_compact if self.config.backbone == "compact" else init_taming
        for module in self.modules():
            init(module, generator)
            if isinstance(module, nn.GroupNorm):
                nn.init.ones_(module.weight)
            if isinstance(module, (nn.Conv2d, nn.GroupNorm)):
                nn.init.zeros_(module.bias)
        self.latent_scale.fill_(1.0)


def _check_shape(what: str, tensor: Tensor, expected: tuple[int, int, int]) -> None:
    if tuple(tensor.shape[1:]) != expected:
        raise InputError(f"expected {what} [B, {', '.join(map(str, expected))}], got {tuple(tensor.shape)}")

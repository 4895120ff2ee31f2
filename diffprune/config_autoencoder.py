"""What an autoencoder is, and what its reconstructions are judged by: sections of ``config.VqvaeRun``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffprune.config_checks import expect


@dataclass(frozen=True)
class VqvaeConfig:
    """An autoencoder's architecture: the arguments of ``models.vqvae.VQVAE`` and ``models.kl.KLAutoencoder``."""

    kind: Literal["vq", "kl"] = "vq"
    """vq: latents are quantised by a codebook (arXiv 1711.00937); kl: they are Gaussians (arXiv 1312.6114)."""
    backbone: Literal["compact", "taming"] = "compact"
    """compact: a small encoder and decoder. taming: those of VQGAN (arXiv 2012.09841) and of latent diffusion, with
    attention."""
    image_size: int = 32
    """Height and width in pixels, a multiple of 2 ** (number of halvings)."""
    in_channels: int = 1
    """1 for luminance, 3 for RGB."""
    base_channels: int = 8
    """Channels of the first convolution."""
    channel_multipliers: tuple[int, ...] = (2, 6)
    """Channels at each resolution, over base_channels. compact: one entry per halving. taming: the first entry is the
    full resolution's, so that 1, 2, 4, 4 halve it three times."""
    blocks_per_level: int = 1
    """Residual blocks at each of these resolutions; taming's decoder has one more, as published."""
    attention_levels: tuple[int, ...] = ()
    """taming: entries of channel_multipliers, from 0, whose blocks are each followed by self-attention."""
    mid_attention: bool = True
    """taming: self-attention between the two blocks at the bottom."""
    norm_groups: int = 32
    """taming: groups of each GroupNorm; channels are multiples of it."""
    z_channels: int = 0
    """taming: channels between the encoder and the 1×1 convolution that makes latents of them, and after its
    counterpart in the decoder; 0: as many as latent_channels."""
    latent_channels: int = 2
    """Channels of a latent, which is also the length of a code."""
    latent_shift: float = 0.0
    """Subtracted from a latent before latent_scale multiplies it: some published models have one."""
    codebook_size: int = 512
    """Number of codes."""
    commitment_weight: float = 0.25
    """β of the VQ-VAE paper, equation 3."""
    codebook_decay: float = 0.99
    """γ of the codebook's moving average, per step."""
    normalize_codes: bool = False
    """Latents and codes of unit length, so that the nearest code is the one of the largest cosine (arXiv 2110.04627);
    a large codebook of short codes is used better so. Needs at least 2 latent_channels."""

    def __post_init__(self) -> None:
        for name in ("image_size", "base_channels", "blocks_per_level", "latent_channels", "codebook_size"):
            expect(getattr(self, name) >= 1, self, name, "at least 1")
        expect(self.in_channels in (1, 3), self, "in_channels", "1 or 3")
        multipliers = self.channel_multipliers
        expect(multipliers and min(multipliers) >= 1, self, "channel_multipliers", "numbers of at least 1")
        expect(self.image_size % self.downsampling == 0, self, "image_size", f"a multiple of {self.downsampling}")
        expect(0 <= self.commitment_weight < math.inf, self, "commitment_weight", "at least 0")
        expect(0 < self.codebook_decay < 1, self, "codebook_decay", "between 0 and 1")
        expect(abs(self.latent_shift) < math.inf, self, "latent_shift", "a finite number")
        if self.backbone == "taming":
            levels = range(len(multipliers))
            expect(set(self.attention_levels) <= set(levels), self, "attention_levels", f"numbers of {[*levels]}")
            expect(self.norm_groups >= 1, self, "norm_groups", "at least 1")
            odd = any(self.base_channels * factor % self.norm_groups for factor in (1, *multipliers))
            expect(not odd, self, "base_channels", f"a multiple of norm_groups {self.norm_groups}")
            expect(self.z_channels >= 0, self, "z_channels", "at least 0")
        else:
            expect(not self.attention_levels, self, "attention_levels", "none with backbone compact")
            expect(not self.z_channels, self, "z_channels", "0 with backbone compact")
        if self.normalize_codes:
            expect(self.kind == "vq", self, "normalize_codes", "false with kind kl, which has no codes")
            expect(self.latent_channels >= 2, self, "latent_channels", "at least 2 with normalize_codes")

    @property
    def downsampling(self) -> int:
        """Pixels on a side of what one position of a latent stands for."""
        return 2 ** (len(self.channel_multipliers) - (self.backbone == "taming"))


@dataclass(frozen=True)
class LossConfig:
    """What an autoencoder's reconstructions are judged by."""

    pixel: Literal["l2", "l1"] = "l2"
    """Mean squared, or mean absolute, difference of pixels."""
    kl_weight: float = 1e-6
    """With kind kl: of the divergence in nats from a standard normal, over the image's elements; 1e-6 is latent
    diffusion's."""
    lpips_weight: float = 0.0
    """Of LPIPS (arXiv 1801.03924) with VGG16; 0 leaves it out."""
    lpips_linear: str = "vgg.pth"
    """LPIPS's linear weights, version 0.1: a local file, or the folder that it is in."""
    lpips_vgg16: str = "vgg16-397923af.pth"
    """torchvision's VGG16: a local file, or the folder that it is in."""
    adversarial_weight: float = 0.0
    """Of a PatchGAN discriminator's verdict, times the adaptive weight (arXiv 2012.09841, equation 7); 0 leaves it
    out."""
    adversarial_start: int = 0
    """Steps before the discriminator begins to learn and to count."""
    discriminator_channels: int = 64
    """Of its first convolution; each of the next has twice as many, up to 8 times."""
    discriminator_layers: int = 3
    """Its halvings; 3 judges patches of 70×70 pixels."""

    def __post_init__(self) -> None:
        for name in ("kl_weight", "lpips_weight", "adversarial_weight"):
            expect(0 <= getattr(self, name) < math.inf, self, name, "at least 0")
        expect(self.adversarial_start >= 0, self, "adversarial_start", "at least 0")
        for name in ("discriminator_channels", "discriminator_layers"):
            expect(getattr(self, name) >= 1, self, name, "at least 1")

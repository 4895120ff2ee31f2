"""A small convolutional encoder and decoder, for small images."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffprune.config import VqvaeConfig


class CompactEncoder(nn.Module):
    """[B, C, H, W] -> [B, out_channels, h, w]."""

    def __init__(self, config: VqvaeConfig, out_channels: int) -> None:
        super().__init__()
        widths = _widths(config)
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 3, padding=1)]
        for previous, width in pairwise(widths):
            layers.append(nn.Conv2d(previous, width, 4, stride=2, padding=1))
            layers.extend(ResidualBlock(width) for _ in range(config.blocks_per_level))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(_norm(widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], out_channels, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class CompactDecoder(nn.Module):
    """[B, D, h, w] -> [B, C, H, W]."""

    def __init__(self, config: VqvaeConfig) -> None:
        super().__init__()
        widths = _widths(config)
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)]
        for width, smaller in pairwise(reversed(widths)):
            layers.extend(ResidualBlock(width) for _ in range(config.blocks_per_level))
            layers.append(nn.Conv2d(width, 4 * smaller, 3, padding=1))
            layers.append(nn.PixelShuffle(2))
        layers += [_norm(widths[0]), nn.SiLU(), nn.Conv2d(widths[0], config.in_channels, 3, padding=1)]
        self.layers = nn.Sequential(*layers)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.layers[-1].weight

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


def init_compact(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise a convolution or norm so that variance is kept."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)


def _widths(config: VqvaeConfig) -> list[int]:
    return [config.base_channels, *(config.base_channels * factor for factor in config.channel_multipliers)]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)

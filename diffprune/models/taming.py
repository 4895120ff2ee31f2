"""The encoder and decoder of VQGAN (Esser et al. 2021, arXiv 2012.09841) and of latent diffusion's autoencoders.

Modules and parameters bear the names of the published state dicts (``encoder.down.0.block.0.conv1.weight``), so that
those load as they are. With channel multipliers 1, 2, 4, 4 a latent is 8 times smaller than the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.config import VqvaeConfig

EPSILON = 1e-6  # of each GroupNorm, as published


class TamingEncoder(nn.Module):
    """[B, C, H, W] -> [B, out_channels, h, w]."""

    def __init__(self, config: VqvaeConfig, out_channels: int) -> None:
        super().__init__()
        groups, width = config.norm_groups, config.base_channels
        self.conv_in = nn.Conv2d(config.in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        for number, factor in enumerate(config.channel_multipliers):
            level = Level(width, factor * config.base_channels, config.blocks_per_level, config, number)
            width = factor * config.base_channels
            if number + 1 < len(config.channel_multipliers):
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, groups, config.mid_attention)
        self.norm_out = nn.GroupNorm(groups, width, EPSILON)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class TamingDecoder(nn.Module):
    """[B, z_channels, h, w] -> [B, C, H, W]."""

    def __init__(self, config: VqvaeConfig, z_channels: int) -> None:
        super().__init__()
        groups, width = config.norm_groups, config.base_channels * config.channel_multipliers[-1]
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, groups, config.mid_attention)
        levels = []
        for number, factor in reversed(list(enumerate(config.channel_multipliers))):
            level = Level(width, factor * config.base_channels, config.blocks_per_level + 1, config, number)
            width = factor * config.base_channels
            if number:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # numbered by resolution, the full one first
        self.norm_out = nn.GroupNorm(groups, width, EPSILON)
        self.conv_out = nn.Conv2d(width, config.in_channels, 3, padding=1)

    @property
    def last_weight(self) -> nn.Parameter:
        return self.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where the config says so."""

    def __init__(self, in_width: int, width: int, blocks: int, config: VqvaeConfig, number: int) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.block.append(Block(in_width, width, config.norm_groups))
            in_width = width
            if number in config.attention_levels:
                self.attn.append(Attention(width, config.norm_groups))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        return x


class Middle(nn.Module):
    """Two blocks at the bottom, with attention between them."""

    def __init__(self, width: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = Block(width, width, groups)
        if attention:
            self.attn_1 = Attention(width, groups)
        self.block_2 = Block(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        if hasattr(self, "attn_1"):
            x = self.attn_1(x)
        return self.block_2(x)


class Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, beside the identity, or a 1×1 convolution where the width changes."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_width, EPSILON)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, EPSILON)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if in_width != width:
            self.nin_shortcut = nn.Conv2d(in_width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + inner


class Attention(nn.Module):
    """Self-attention over all positions, one head of all channels, beside the identity."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, EPSILON)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).mT.unsqueeze(1) for part in (self.q, self.k, self.v))  # [B, 1, h·w, width]
        found = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(found.squeeze(1).mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]; padded below and to the right alone, as published."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2·H, 2·W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def init_taming(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise a convolution as published, with PyTorch's default range."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)

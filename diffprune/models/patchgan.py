"""A discriminator of image patches (Isola et al. 2017, arXiv 1611.07004), as VQGAN (arXiv 2012.09841) uses it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_WIDENING = 8
# The adaptive weight's: a floor of the gradient that it divides by, and its ceiling.
_LEAST_GRADIENT, MOST_WEIGHT = 1e-4, 1e4


class PatchDiscriminator(nn.Module):
    """Images [B, C, H, W] in [-1, 1] -> a verdict on each patch [B, 1, h, w]: positive for real.

    4×4 convolutions, ``layers`` of them with stride 2. Where pix2pix and VQGAN have a batch norm, each image is
    normalised by itself here (as pix2pix does at its batch size of 1): so the verdict on an image does not depend on
    which others are in its batch, nor training on how many processes share one.

    Initial weights are normal with a standard deviation of 0.02, as published, drawn from ``generator``.
    """

    def __init__(self, in_channels: int, channels: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        with torch.device("meta"):  # the global generator is left as it was
            self.layers = nn.Sequential(*_layers(in_channels, channels, layers))
        self.to_empty(device="cpu")
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            elif isinstance(module, nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def _layers(in_channels: int, channels: int, layers: int) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
    width = channels
    for number in range(1, layers + 1):
        wider, stride = channels * min(2**number, MOST_WIDENING), 2 if number < layers else 1
        modules.append(nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False))
        modules += [nn.GroupNorm(wider, wider), nn.LeakyReLU(0.2)]  # a group per channel: an instance norm
        width = wider
    return [*modules, nn.Conv2d(width, 1, 4, padding=1)]


def discriminator_loss(real: Tensor, reconstructed: Tensor) -> Tensor:
    """The hinge loss of verdicts: half of mean(max(0, 1 − real)) + mean(max(0, 1 + reconstructed))."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + reconstructed.float()).mean())


def adaptive_weight(reconstruction_gradient: Tensor, adversarial_gradient: Tensor) -> Tensor:
    """‖∇ reconstruction loss‖ / (‖∇ adversarial loss‖ + 1e-4), at most 1e4 (arXiv 2012.09841, equation 7).

    Both gradients are those with respect to the decoder's last weight; so there both terms pull equally.
    """
    weight = reconstruction_gradient.norm() / (adversarial_gradient.norm() + _LEAST_GRADIENT)
    return weight.clamp(0, MOST_WEIGHT).detach()

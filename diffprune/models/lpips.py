"""LPIPS, the learned perceptual distance (Zhang et al. 2018, arXiv 1801.03924), with VGG16, from local weight files."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.errors import InputError
from diffprune.files import sha256_file
from diffprune.weight_files import read_weights

LINEAR_FILE = "vgg.pth"
LINEAR_FROM = "lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity (7 kB)"
VGG16_FILE = "vgg16-397923af.pth"
VGG16_FROM = "download.pytorch.org/models (528 MB)"
# VGG16's 3×3 convolutions, with torchvision's numbers; before each list but the first comes a 2×2 maximum. What LPIPS
# compares is the output of each list's last ReLU.
CONVOLUTIONS = [
    [(0, 3, 64), (2, 64, 64)],
    [(5, 64, 128), (7, 128, 128)],
    [(10, 128, 256), (12, 256, 256), (14, 256, 256)],
    [(17, 256, 512), (19, 512, 512), (21, 512, 512)],
    [(24, 512, 512), (26, 512, 512), (28, 512, 512)],
]
SMALLEST = 16  # pixels, of which the last maximum leaves one
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class LPIPS(nn.Module):
    """The distance of two images: Σ over layers of the mean over positions of Σ_c w_c (â_c − b̂_c)² (equation 1).

    â and b̂ are the features of the two images, of unit length over channels at each position. Weights are
    uninitialised until they are loaded; ``load_lpips`` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {str(number): nn.Conv2d(i, o, 3, padding=1) for part in CONVOLUTIONS for number, i, o in part}
        )
        for number, part in enumerate(CONVOLUTIONS):
            self.register_buffer(f"linear{number}", torch.empty(part[-1][2]))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Images [B, 1 or 3, H, W] in [-1, 1] and others like them -> distances [B] float32.

        Gray images are taken as RGB. Raises InputError for other shapes, and for less than 16 pixels on a side.
        """
        if images.shape != others.shape or images.dim() != 4 or images.shape[1] not in (1, 3):
            raise InputError(
                f"expected two batches of images [B, 1 or 3, H, W], got {[*images.shape]} and {[*others.shape]}"
            )
        if min(images.shape[2:]) < SMALLEST:
            raise InputError(f"LPIPS: expected images of at least {SMALLEST} pixels a side, got {[*images.shape]}")
        shift, scale = (images.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x, y = ((batch.expand(-1, 3, -1, -1) - shift) / scale for batch in (images, others))
        distance = torch.zeros(len(images), device=images.device)
        for number, part in enumerate(CONVOLUTIONS):
            if number:
                x, y = F.max_pool2d(x, 2), F.max_pool2d(y, 2)
            for name, _, _ in part:
                x, y = (F.relu(self.features[str(name)](batch)) for batch in (x, y))
            squares = (_unit(x) - _unit(y)).square()
            weights = getattr(self, f"linear{number}").to(squares.dtype)
            distance = distance + torch.einsum("bchw,c->bhw", squares, weights).mean(dim=(1, 2))
        return distance


def load_lpips(
    linear: str | os.PathLike, vgg16: str | os.PathLike, device: torch.device | str = "cpu"
) -> tuple[LPIPS, list[str]]:
    """LPIPS with the published weights, frozen, and the sha256 of both files.

    Args:
        linear: LPIPS's ``vgg.pth``, version 0.1, or the folder that it is in.
        vgg16: torchvision's ``vgg16-397923af.pth``, or the folder that it is in.

    Raises: InputError that says which file to put where if one is missing, or which tensor is wrong. The files are
    pickles: only tensors and plain containers are accepted (``weights_only=True``), never code.
    """
    linear, vgg16 = _found(linear, LINEAR_FILE, LINEAR_FROM), _found(vgg16, VGG16_FILE, VGG16_FROM)
    with torch.device("meta"):
        model = LPIPS()
    tensors = {}
    convolutions = read_weights(vgg16)  # the classifier is left where it is
    for name, module in model.features.items():
        for part, want in module.state_dict().items():
            value = _checked(convolutions, f"features.{name}.{part}", want.shape, vgg16, VGG16_FILE)
            tensors[f"features.{name}.{part}"] = value
    weights = read_weights(linear)
    for number, part in enumerate(CONVOLUTIONS):
        shape = torch.Size((1, part[-1][2], 1, 1))
        tensors[f"linear{number}"] = _checked(
            weights, f"lin{number}.model.1.weight", shape, linear, LINEAR_FILE
        ).ravel()
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False).to(device), [sha256_file(path) for path in (linear, vgg16)]


def _unit(features: Tensor) -> Tensor:
    """[B, C, h, w] of unit length over C. Where all are 0 the root has no gradient, and the ReLU lets none through."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)


def _found(path: str | os.PathLike, name: str, source: str) -> Path:
    path = Path(path)
    path = path / name if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such file; LPIPS needs {name} from {source}: put it there")
    return path


def _checked(tensors: dict[str, Tensor], name: str, shape: torch.Size, path: Path, file: str) -> Tensor:
    value = tensors.get(name)
    if value is None or value.shape != shape or not value.is_floating_point() or not value.isfinite().all():
        found = "none" if value is None else f"{[*value.shape]}, or values that are not finite"
        raise InputError(f"{path}: tensor {name!r}: expected {[*shape]}, found {found}; expected the weights of {file}")
    return value.float()

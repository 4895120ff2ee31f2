"""FID's Inception v3, the network that the Fréchet Inception Distance is defined by, from a local file of its weights.

This is the graph of 2015-12-05 that Heusel et al. (2017, arXiv 1706.08500) took, not torchvision's Inception v3: it
has 1008 outputs, its average pools leave the padding out, and the last block takes a maximum where the paper has a
mean. Modules and parameters bear the names of the published conversion of its weights to PyTorch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffprune.errors import InputError
from diffprune.files import sha256_file
from diffprune.weight_files import read_weights

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_FROM = "the release `fid_weights` of github.com/mseitzer/pytorch-fid"
INPUT_SIZE = 299
DEFAULT_SIZE = 256
_NAME = re.compile(r"inception(?:@(\d+))?:(.+)")
FEATURES = 2048


class FidInception(nn.Module):
    """Images uint8 [B, 3, H, W] of any one size -> pool features float32 [B, 2048].

    Resizing is TensorFlow 1's bilinear one (``resize_bilinear_tf1``), as in the published evaluation graph, in
    torch-fidelity and in ADM's evaluator; pytorch-fid and clean-fid resize differently, and their distances differ in
    the second digit. Weights are uninitialised until they are loaded; ``load_inception`` does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3)
        self.Mixed_5b = BlockA(192, pool_width=32)
        self.Mixed_5c = BlockA(256, pool_width=64)
        self.Mixed_5d = BlockA(288, pool_width=64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, width=128)
        self.Mixed_6c = BlockC(768, width=160)
        self.Mixed_6d = BlockC(768, width=160)
        self.Mixed_6e = BlockC(768, width=192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, pool=_mean_3x3)
        self.Mixed_7c = BlockE(2048, pool=_max_3x3)
        self.fc = nn.Linear(FEATURES, 1008)

    def forward(self, images: Tensor) -> Tensor:
        """See the class. Raises InputError for another shape or dtype."""
        if images.dim() != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            raise InputError(f"expected images uint8 [B, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        x = (resize_bilinear_tf1(images.to(self.fc.weight.dtype), INPUT_SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))

    def logits(self, features: Tensor) -> Tensor:
        """[B, 2048] -> [B, 1008] without the bias, as the Inception Score is computed."""
        return features @ self.fc.weight.T


def load_inception(path: str | os.PathLike, device: torch.device | str = "cpu") -> tuple[FidInception, dict[str, Any]]:
    """FID's Inception with the weights of a local ``.pth`` or ``.safetensors`` file, and {"sha256", "path"} of it.

    Raises InputError that says which file to put where if there is none, or which tensor is wrong. A ``.pth`` is a
    pickle: only tensors and plain containers are accepted (``weights_only=True``), never code.
    """
    path = Path(path)
    if path.is_dir():
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file; download {WEIGHTS_FILE} from {WEIGHTS_FROM} (95 MB) and put it there")
    tensors = read_weights(path)
    with torch.device("meta"):
        model = FidInception()
    expected = model.state_dict()
    for name, want in expected.items():
        if name.endswith("num_batches_tracked"):  # a counter that files may lack and inference does not use
            tensors[name] = torch.zeros((), dtype=torch.int64)
        got = tensors.get(name)
        if got is None or got.shape != want.shape or not (got.dtype == want.dtype or got.is_floating_point()):
            found = "none" if got is None else f"{list(got.shape)} {str(got.dtype).removeprefix('torch.')}"
            raise InputError(
                f"{path}: tensor {name!r}: expected {list(want.shape)}, found {found}; expected the weights of FID's "
                f"Inception, {WEIGHTS_FILE} from {WEIGHTS_FROM}"
            )
        if not got.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} has values that are not finite; download the file again")
    if unknown := sorted(set(tensors) - set(expected)):
        raise InputError(
            f"{path}: tensor {unknown[0]!r} is not part of FID's Inception (torchvision's Inception v3 is another "
            f"network); expected {WEIGHTS_FILE} from {WEIGHTS_FROM}"
        )
    model.load_state_dict({name: tensors[name].to(want.dtype) for name, want in expected.items()}, assign=True)
    return model.eval().requires_grad_(False).to(device), {"sha256": sha256_file(path), "path": str(path)}


def inception_features(
    name: str, device: torch.device | str = "cpu"
) -> tuple[Callable[[Tensor], Tensor], int, dict[str, Any], str]:
    """The embedder ``inception:PATH`` or ``inception@SIZE:PATH``: (function, image size, what identifies it, path).

    Images are cropped and resized to SIZE first (256 by default), as the data set that the model was trained on was:
    give the size of the generated images. ``function``: uint8 [B, 3, SIZE, SIZE] -> float32 [B, 2048], which must not
    be normalised: FID is defined on the features as they are. Raises InputError as ``load_inception``.
    """
    match = _NAME.fullmatch(name)
    size = int(match[1] or DEFAULT_SIZE) if match else 0
    if size < 1:
        raise InputError(f"model: expected inception:PATH or inception@SIZE:PATH with {WEIGHTS_FILE}, got {name!r}")
    model, info = load_inception(match[2], device)

    def features(images: Tensor) -> Tensor:
        # In float32 on a GPU too: convolutions in TF32 move the third digit of a distance.
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            return model(images)

    resize = f"tensorflow 1 bilinear to {INPUT_SIZE}"
    head = {"model": "inception", "model_sha256": info["sha256"], "unit_length": False, "resize": resize}
    return features, size, head, info["path"]


def resize_bilinear_tf1(x: Tensor, size: int) -> Tensor:
    """[B, C, H, W] float -> [B, C, size, size] as TensorFlow 1's ``resize_bilinear`` (align_corners false) does.

    Output pixel i is read at i·H/size, without the half-pixel shift and without any filter when shrinking.
    """
    x = _lerp(x, *_taps(x.shape[3], size, x), dim=3)
    low, high, weight = _taps(x.shape[2], size, x)
    return _lerp(x, low, high, weight[:, None], dim=2)


def _taps(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(length, dtype=torch.float32) / size
    position = torch.arange(size, dtype=torch.float32) * scale  # float32, as TensorFlow does
    low = position.floor().long()
    high = (low + 1).clamp(max=length - 1)
    return low.to(like.device), high.to(like.device), (position - low).to(like)


def _lerp(x: Tensor, low: Tensor, high: Tensor, weight: Tensor, dim: int) -> Tensor:
    start = x.index_select(dim, low)
    return start + (x.index_select(dim, high) - start) * weight


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int], **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **options)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class BlockA(nn.Module):
    """35×35: 1×1, 5×5, two 3×3, and a mean pool, side by side."""

    def __init__(self, width: int, pool_width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(width, 64, 1)
        self.branch5x5_1 = ConvNorm(width, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvNorm(width, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, padding=1)
        self.branch_pool = ConvNorm(width, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_3x3(x))], dim=1)


class BlockB(nn.Module):
    """35×35 -> 17×17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvNorm(width, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, kernel_size=3, stride=2)], dim=1)


class BlockC(nn.Module):
    """17×17: 1×1, a 7×7 and two 7×7 as rows and columns, and a mean pool."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvNorm(in_width, 192, 1)
        self.branch7x7_1 = ConvNorm(in_width, width, 1)
        self.branch7x7_2 = ConvNorm(width, width, **row)
        self.branch7x7_3 = ConvNorm(width, 192, **column)
        self.branch7x7dbl_1 = ConvNorm(in_width, width, 1)
        self.branch7x7dbl_2 = ConvNorm(width, width, **column)
        self.branch7x7dbl_3 = ConvNorm(width, width, **row)
        self.branch7x7dbl_4 = ConvNorm(width, width, **column)
        self.branch7x7dbl_5 = ConvNorm(width, 192, **row)
        self.branch_pool = ConvNorm(in_width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean_3x3(x))], dim=1)


class BlockD(nn.Module):
    """17×17 -> 8×8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(width, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvNorm(width, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, kernel_size=3, stride=2)], dim=1)


class BlockE(nn.Module):
    """8×8: 1×1, 3×3 split into rows and columns, twice, and a pool."""

    def __init__(self, width: int, pool: Any) -> None:
        super().__init__()
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.pool = pool
        self.branch1x1 = ConvNorm(width, 320, 1)
        self.branch3x3_1 = ConvNorm(width, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, **row)
        self.branch3x3_2b = ConvNorm(384, 384, **column)
        self.branch3x3dbl_1 = ConvNorm(width, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvNorm(384, 384, **row)
        self.branch3x3dbl_3b = ConvNorm(384, 384, **column)
        self.branch_pool = ConvNorm(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        sides = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        sides += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *sides, self.branch_pool(self.pool(x))], dim=1)


def _mean_3x3(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def _max_3x3(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=1, padding=1)

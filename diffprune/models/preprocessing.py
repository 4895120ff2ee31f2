"""How an embedder wants its images: resized and cropped on the CPU as bytes, normalised on the device as floats.

Resizing is Pillow's, antialiased, on 8-bit pixels, as CLIP, SigLIP and DINOv2 were published with; sizes and crop
offsets are rounded as the published processors round them, so that pixels agree with theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffprune.decode import MAX_PIXELS, DecodeError
from diffprune.errors import InputError
from diffprune.files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, then ``(pixel * scale - mean) / std``.

    ``resize``: the shorter side, keeping the aspect ratio, or (height, width) whatever it was. ``crop``: (height,
    width), or None. ``crop_rounding``: where half a pixel goes, "floor" (transformers) or "even" (torchvision, which
    open_clip uses). ``mean`` and ``std`` are per RGB channel, in units of scaled pixels.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: str = "bicubic"
    scale: float = 1 / 255
    crop_rounding: Literal["floor", "even"] = "floor"

    def __post_init__(self) -> None:
        sides = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if min(*sides, *(self.crop or ())) < 1 or self.size[0] > sides[0] or self.size[1] > sides[1]:
            raise InputError(f"expected a crop that fits into the resized image, got {self.crop} of {self.resize}")
        if sides[0] * sides[1] > MAX_PIXELS:
            raise InputError(f"expected images of at most {MAX_PIXELS:,} pixels, got a resize to {self.resize}")
        if self.crop is None and isinstance(self.resize, int):
            raise InputError(f"expected a crop, for images of one size: only the shorter side is set, to {self.resize}")
        if self.resample not in RESAMPLING:
            raise InputError(f"resample: expected one of {', '.join(RESAMPLING)}, got {self.resample!r}")
        if not all(value > 0 for value in self.std):
            raise InputError(f"image_std: expected positive numbers, got {self.std}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what comes out."""
        if self.crop is not None:
            return self.crop
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize

    def __call__(self, image: Image) -> Image:
        """Resize and crop an image; raises DecodeError if its aspect ratio would make it over 100 million pixels."""
        width, height = self._resized(image.width, image.height)
        if width * height > MAX_PIXELS:
            raise DecodeError(
                f"{image.width}×{image.height} pixels: too thin, with the shorter side at {self.resize} it would have "
                f"{width}×{height}, more than {MAX_PIXELS:,}"
            )
        if (width, height) != image.size:
            image = image.resize((width, height), resample=RESAMPLING[self.resample])
        if self.crop is None:
            return image
        top, left = (self._offset(side, crop) for side, crop in zip((height, width), self.crop, strict=True))
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32, on the device that they are on."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (images.float() * self.scale - mean) / std

    def describe(self) -> dict[str, Any]:
        """What identifies it in a fingerprint, JSON-able."""
        return {
            "resize": self.resize if isinstance(self.resize, int) else list(self.resize),
            "crop": None if self.crop is None else list(self.crop),
            "crop_rounding": self.crop_rounding,
            "resample": self.resample,
            "scale": self.scale,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def _offset(self, side: int, crop: int) -> int:
        return (side - crop) // 2 if self.crop_rounding == "floor" else round((side - crop) / 2)


def read_transformers_preprocessing(folder: Path) -> Preprocessing:
    """The preprocessing that ``preprocessor_config.json`` of a transformers model describes.

    A newer ``processor_config.json``, which holds the same under "image_processor", will do too. Raises InputError
    if there is neither, or if a field is missing or unknown here.
    """
    path, config = _processor_config(folder)
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step, True) is not True:
            raise InputError(f"{path}: {step}: expected true, found {config[step]!r}; such models are not supported")
    crop = config.get("crop_size")
    if config.get("do_center_crop", crop is not None):
        crop = _sides(crop, path, "crop_size")
        crop = (crop, crop) if isinstance(crop, int) else crop
    else:
        crop = None
    number = config.get("resample")
    resample = next((name for name, value in RESAMPLING.items() if value == number and number is not None), None)
    if resample is None:
        raise InputError(f"{path}: resample: expected one of Pillow's numbers 0 to 5, found {number!r}")
    scale = config.get("rescale_factor", 1 / 255)
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise InputError(f"{path}: rescale_factor: expected a positive number, found {scale!r}")
    resize = _sides(config.get("size"), path, "size")
    if isinstance(resize, int) and crop is None:
        resize = (resize, resize)
    mean, std = (_channels(config.get(name), path, name) for name in ("image_mean", "image_std"))
    return Preprocessing(resize, crop, mean, std, resample, float(scale))


def _processor_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = folder / "preprocessor_config.json"
    if path.is_file():
        config = read_json(path)
    elif (path := folder / "processor_config.json").is_file():
        config = read_json(path)
        config = config.get("image_processor") if isinstance(config, dict) else None
    else:
        raise InputError(
            f"{folder}: no preprocessor_config.json, which says how the model's images are resized and normalised; "
            f"download it from where the model came from, into this folder"
        )
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected the fields of an image processor, found something else")
    return path, config


def _sides(value: Any, path: Path, name: str) -> int | tuple[int, int]:
    """224, {"shortest_edge": 224} or {"height": 224, "width": 224}; older files have the first."""
    if isinstance(value, dict):
        sides = {key: side for key, side in value.items() if side is not None}
        if sides.keys() == {"shortest_edge"}:
            value = sides["shortest_edge"]
        elif sides.keys() == {"height", "width"}:
            value = (sides["height"], sides["width"])
    if not all(type(side) is int for side in (value if isinstance(value, tuple) else (value,))):
        raise InputError(f"{path}: {name}: expected a number, shortest_edge, or height and width, found {value!r}")
    return value


def _channels(value: Any, path: Path, name: str) -> tuple[float, float, float]:
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(item, (int, float)) for item in value):
        raise InputError(f"{path}: {name}: expected 3 numbers, one per channel, found {value!r}")
    return tuple(float(item) for item in value)

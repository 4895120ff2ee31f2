"""One image: bytes -> pixels, strictly.

JPEG goes through simplejpeg (libjpeg-turbo) with ``strict=True``, the only decoder that notices flipped bits; all
else through Pillow. Its PNG reader skips the CRCs of the pixels, so they are checked here.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffprune.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
_PNG = b"\x89PNG\r\n\x1a\n"


class DecodeError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Resizer(Protocol):
    """Makes any image one of ``size`` (height, width), as a model's own preprocessing does."""

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(self, image: Image) -> Image: ...


@dataclass(frozen=True)
class Decoding:
    """How bytes become pixels.

    ``size``: the centre square resized to it (see ``center_crop``) unless the image has that size already; a Resizer
    does as it says; None keeps the image's own size. ``channels``: 3 for RGB, 1 for luminance.

    ``strict``: refuse whatever can be noticed, flipped bits in a JPEG or PNG too. If false, one that is refused for
    that alone has the pixels that Pillow (so webdataset's ``.decode("pil")``, and torchvision) makes of it, and a note.
    ``max_pixels``: an image whose header says more is refused before it is decoded.
    """

    size: int | Resizer | None = None
    channels: int = 3
    strict: bool = True
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"expected channels 1 or 3, got {self.channels}")
        if self.max_pixels < 1:
            raise InputError(f"max_pixels: expected 1 or more, got {self.max_pixels}")

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of every image, None where they keep their own."""
        if self.size is None:
            return None
        return (self.channels, *(self.size.size if callable(self.size) else (self.size, self.size)))

    def decode(self, data: bytes, room: np.ndarray | None = None) -> tuple[np.ndarray, str | None]:
        """One JPEG, PNG or WebP -> (uint8 [C, H, W], None or what is wrong with it although it decodes).

        The format is told by the bytes, not by a name. Of several frames the first counts; an EXIF rotation is not
        applied, as Pillow doesn't. The array may be a view with another memory layout. ``room``, uint8 [H, W, C] and
        contiguous, is where a JPEG of just that size is decoded to: fresh memory for each image would cost a third of
        the time. It may hold anything after a DecodeError. Raises DecodeError.
        """
        pixels, note = self._decode(data, room)
        return self.fit(pixels).transpose(2, 0, 1), note

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Decoded pixels uint8 [H, W, channels], cropped and resized as ``size`` says; DecodeError if too thin."""
        if not callable(self.size) and (self.size is None or pixels.shape[:2] == (self.size, self.size)):
            return pixels
        from PIL import Image

        image = Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)
        if callable(self.size):
            image = self.size(image)
        else:
            self._check_resized(image)
            image = center_crop(image, self.size)
        return np.asarray(image).reshape(image.height, image.width, self.channels)

    def _decode(self, data: bytes, room: np.ndarray | None) -> tuple[np.ndarray, str | None]:
        note = None
        try:
            if data[:8] == _PNG:
                _check_png(data)
            elif data[:3] == b"\xff\xd8\xff":
                pixels = _decode_jpeg(data, self, room)
                if pixels is not None:
                    return pixels, None
        except _DamagedImage as error:
            if self.strict:
                raise
            note = str(error)
        return _decode_pillow(data, self), note

    def check_pixels(self, width: int, height: int) -> None:
        """Raise DecodeError for an empty or a too large image."""
        if not 0 < width * height <= self.max_pixels:
            raise DecodeError(f"{width}×{height} pixels; expected 1 to {self.max_pixels:,}")

    def _check_resized(self, image: Image) -> None:
        """One pixel high and a million wide, it would be that wide times ``size`` squared."""
        pixels = self.size**2 * max(image.size) // min(image.size)
        if pixels > self.max_pixels:
            raise DecodeError(
                f"{image.width}×{image.height} pixels: too thin, with the shorter side at {self.size} it would have "
                f"{pixels:,}, more than {self.max_pixels:,}"
            )


def decode_image(
    data: bytes,
    *,
    size: int | Resizer | None = None,
    channels: int = 3,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode one JPEG, PNG or WebP to uint8 [C, H, W], contiguous. See ``Decoding`` for the arguments.

    Raises DecodeError if the bytes are damaged, no known image, or more than ``max_pixels``.
    """
    return np.ascontiguousarray(Decoding(size, channels, strict, max_pixels).decode(data)[0])


def center_crop(image: Image, size: int) -> Image:
    """Resize the shorter side to ``size`` and crop the centre: halving with a box filter while that is possible,
    then bicubic, as ADM (Dhariwal & Nichol 2021) and DiT prepare ImageNet."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    if scale != 1:
        width, height = max(size, round(image.width * scale)), max(size, round(image.height * scale))
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class _DamagedImage(DecodeError):
    """Refused because decoding is strict; Pillow may make something of it."""


def _check_png(data: bytes) -> None:
    """Raise _DamagedImage unless every chunk up to the last, IEND, is there with its CRC."""
    at, bytes_ = len(_PNG), memoryview(data)
    while True:
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + length  # length, name, data, CRC
        if end > len(data):
            raise _DamagedImage(f"damaged PNG: cut after {len(data):,} bytes, in the chunk that begins at {at:,}")
        if zlib.crc32(bytes_[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            raise _DamagedImage(f"damaged PNG: wrong CRC of the chunk {data[at + 4 : at + 8]!r} at byte {at:,}")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end


def _decode_jpeg(data: bytes, decoding: Decoding, room: np.ndarray | None) -> np.ndarray | None:
    """uint8 [H, W, C], in ``room`` if it has that shape; or None for a CMYK file, which is whole but which simplejpeg
    cannot turn into RGB."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise _DamagedImage(f"damaged JPEG: {error}") from error
    decoding.check_pixels(width, height)
    target = "CMYK" if colorspace in ("CMYK", "YCCK") else "GRAY" if decoding.channels == 1 else "RGB"
    if room is not None and (target == "CMYK" or room.shape != (height, width, decoding.channels)):
        room = None
    try:
        with _one_at_a_time(width * height):
            pixels = simplejpeg.decode_jpeg(data, colorspace=target, strict=True, buffer=room)
    except ValueError as error:
        raise _DamagedImage(f"damaged JPEG: {error}") from error
    return None if target == "CMYK" else pixels


def _decode_pillow(data: bytes, decoding: Decoding) -> np.ndarray:
    """uint8 [H, W, C] of a PNG, WebP or JPEG, told by its first bytes."""
    from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

    # not Image.open, which has a limit of its own on pixels, in a global variable (for a WebP it counts all the same)
    if data[:8] == _PNG:
        opener = PngImagePlugin.PngImageFile
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        opener = WebPImagePlugin.WebPImageFile
    elif data[:3] == b"\xff\xd8\xff":
        opener = JpegImagePlugin.JpegImageFile
    else:
        raise DecodeError(f"damaged, or no JPEG, PNG or WebP: {len(data):,} bytes, first {data[:8]!r}")
    damaged = (OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, struct.error)
    try:
        with opener(io.BytesIO(data)) as image:
            decoding.check_pixels(*image.size)
            with _one_at_a_time(image.width * image.height):
                if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion would clip, not scale
                    values = np.asarray(image, dtype=np.float64) / 257
                    image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
                pixels = np.asarray(_on_white(image).convert("L" if decoding.channels == 1 else "RGB"))
    except DecodeError:
        raise
    except (*damaged, Image.DecompressionBombError) as error:
        raise DecodeError(f"damaged image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], decoding.channels)


def _on_white(image: Image) -> Image:
    """What is transparent shows white, not the colour that happens to be stored there."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


_LARGE = 16_000_000  # pixels
_one_large_image = threading.Lock()


def _one_at_a_time(pixels: int) -> AbstractContextManager:
    """Threads decode large images one at a time: memory is that of one, however many threads there are."""
    return _one_large_image if pixels > _LARGE else nullcontext()

"""Images and labels out of shards: bytes -> pixels, strictly.

JPEG goes through simplejpeg (libjpeg-turbo) with ``strict=True``, the only decoder that notices flipped bits; all
else through Pillow, whose PNG reader checks CRCs. A sample that cannot be decoded is a failed sample with a reason,
never a wrong picture and never the end of the run.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from diffprune.errors import InputError
from diffprune.shards import Sample, ShardIndex, ShardReader, ShardSpec, index_shards

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

MAX_PIXELS = 100_000_000


class DecodeError(ValueError):
    """An image that cannot be decoded; the message says why."""


class Resizer(Protocol):
    """Makes any image one of ``size`` (height, width), as a model's own preprocessing does."""

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(self, image: Image) -> Image: ...


@dataclass
class Batch:
    """Consecutive samples of one shard. Failed samples have zero pixels and an error.

    ``images`` is uint8 [B, C, H, W]; ``labels`` are the integers of ``cls``, None where there is none.
    """

    samples: list[Sample]
    images: np.ndarray
    labels: list[int | None]
    uids: list[str | None]
    errors: list[str | None]

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]


def decode_image(data: bytes, *, size: int | Resizer | None = None, channels: int = 3) -> np.ndarray:
    """Decode one JPEG, PNG or WebP to uint8 [C, H, W].

    ``size``: centre-cropped to a square and resized to it, unless it has that size already; a Resizer does as it says;
    None keeps the image's own size. ``channels``: 3 for RGB, 1 for luminance. The format is told by the bytes, not by
    a name. Raises DecodeError if the bytes are damaged, no known image, or over 100 million pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"expected channels 1 or 3, got {channels}")
    pixels = _decode_jpeg(data, channels) if data[:3] == b"\xff\xd8\xff" else None
    if pixels is None:
        pixels = _decode_pillow(data, channels)
    if callable(size) or (size is not None and pixels.shape[:2] != (size, size)):
        from PIL import Image

        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        image = size(image) if callable(size) else center_crop(image, size)
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


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


def read_batches(
    index: ShardIndex,
    *,
    size: int | Resizer | None,
    channels: int,
    batch_size: int = 256,
    keys: frozenset[str] | None = None,
) -> Iterator[Batch]:
    """Decode a shard batch by batch, in file order; ``keys`` restricts it to these.

    With ``size=None`` all images of a batch must have one size: use ``batch_size=1`` if they don't.
    """
    samples = [sample for sample in index.samples if keys is None or sample.key in keys]
    with ShardReader(index.path) as reader:
        for start in range(0, len(samples), batch_size):
            yield _read_batch(reader, samples[start : start + batch_size], size, channels)


def read_annotations(reader: ShardReader, sample: Sample) -> tuple[int | None, str | None, str | None]:
    """(label, uid, error) of a sample: ``cls`` and the json's uid, None where there is none; why ``cls`` is wrong."""
    try:
        return _read_label(reader, sample), _read_uid(reader, sample), None
    except DecodeError as failure:
        return None, _read_uid(reader, sample), str(failure)


def load_images(
    shards: ShardSpec,
    *,
    size: int | None,
    channels: int,
    kept: str | Path | None = None,
    keys: Iterable[str] | None = None,
) -> tuple[pa.Table, np.ndarray]:
    """Read whole shards into memory: (base table, images uint8 [N, C, size, size]), row-aligned, in shard order.

    ``kept`` (a kept.parquet) or ``keys`` restrict it; a key that is in no shard raises InputError. Failed samples are
    in the table with their error, and zero in the array.
    """
    import pyarrow as pa

    from diffprune.tables import base_table, kept_keys

    wanted = frozenset(keys) if keys is not None else kept_keys(kept) if kept is not None else None
    tables, images = [], []
    for index in index_shards(shards):
        for batch in read_batches(index, size=size, channels=channels, keys=wanted):
            tables.append(base_table(index.path.name, batch.samples, batch.labels, batch.uids, batch.errors))
            images.append(batch.images)
    table = pa.concat_tables(tables) if tables else base_table("", [], [], [], [])
    if wanted is not None and table.num_rows != len(wanted):
        missing = min(wanted.difference(table["key"].to_pylist()))
        raise InputError(
            f"{kept or 'keys'}: key {missing!r} is in none of the shards; is this a selection of another data set?"
        )
    return table, np.concatenate(images) if images else np.zeros((0, channels, size or 0, size or 0), np.uint8)


def _read_batch(reader: ShardReader, samples: list[Sample], size: int | Resizer | None, channels: int) -> Batch:
    pixels: list[np.ndarray | None] = []
    labels: list[int | None] = []
    uids: list[str | None] = []
    errors: list[str | None] = []
    for sample in samples:
        label, uid, error = read_annotations(reader, sample)
        image = None
        if error is None:
            try:
                image = decode_image(_read_image(reader, sample), size=size, channels=channels)
            except DecodeError as failure:
                error = str(failure)
        pixels.append(image)
        labels.append(label)
        uids.append(uid)
        errors.append(error)
    sides = size.size if callable(size) else (size or 1, size or 1)
    blank = np.zeros(next((image.shape for image in pixels if image is not None), (channels, *sides)), dtype=np.uint8)
    images = np.stack([blank if image is None else image for image in pixels])
    return Batch(samples, images, labels, uids, errors)


def _read_image(reader: ShardReader, sample: Sample) -> bytes:
    images = sample.images()
    if len(images) != 1:
        names = ", ".join(member.name for member in (images or sample.members))
        raise DecodeError(f"expected one jpg, png or webp member, found {len(images)} among: {names}")
    return reader.read(images[0])


def _read_label(reader: ShardReader, sample: Sample) -> int | None:
    member = sample.member("cls")
    if member is None:
        return None
    text = reader.read(member)[:64]
    try:
        label = int(text)
    except ValueError:
        raise DecodeError(f"cls: expected an integer, found {text!r}") from None
    if not 0 <= label < 1 << 31:
        raise DecodeError(f"cls: expected a class number from 0, found {label}")
    return label


def _read_uid(reader: ShardReader, sample: Sample) -> str | None:
    member = sample.member("json")
    if member is None:
        return None
    try:
        fields = json.loads(reader.read(member))
    except (ValueError, RecursionError):
        return None
    uid = fields.get("uid") if isinstance(fields, dict) else None
    return uid if isinstance(uid, str) and re.fullmatch(r"[0-9a-f]{32}", uid) else None


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """[H, W, C], or None for the CMYK files that simplejpeg cannot turn into RGB."""
    import simplejpeg

    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        if colorspace in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, colorspace="GRAY" if channels == 1 else "RGB", strict=True)
    except DecodeError:
        raise
    except ValueError as error:
        raise DecodeError(f"damaged JPEG: {error}") from error


def _decode_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "JPEG")) as image:
            _check_pixels(*image.size)
            if image.mode.startswith("I"):  # 16 bit: Pillow's own conversion would clip, not scale
                values = np.asarray(image, dtype=np.float64) / 257
                image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
            pixels = np.asarray(_on_white(image).convert("L" if channels == 1 else "RGB"))
    except UnidentifiedImageError:
        raise DecodeError(f"damaged, or no JPEG, PNG or WebP: {len(data):,} bytes, first {data[:8]!r}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(f"damaged image: {error}") from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _on_white(image: Image) -> Image:
    """What is transparent shows white, not the colour that happens to be stored there."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _check_pixels(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise DecodeError(f"{width}×{height} pixels; expected 1 to {MAX_PIXELS:,}")

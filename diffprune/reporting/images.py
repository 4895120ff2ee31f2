"""Pictures in the page: thumbnails of a few samples, and grids, as data URIs."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from diffprune.decode import center_crop, read_batches
from diffprune.errors import InputError
from diffprune.shards import ShardSpec, find_shards, index_found, index_shards
from diffprune.storage import as_path

THUMBNAIL = 112  # pixels a side: shown at half of that, so sharp on dense screens
LOSSLESS = 64  # up to this side PNG, and scaled up without smoothing
GRID_CANDIDATES = 480
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def thumbnails(
    shards: ShardSpec, keys: Collection[str], names: Collection[str] | None = None
) -> dict[str, np.ndarray | None]:
    """Key -> pixels uint8 [H, W, 3], at most 112 a side, or None for an image that cannot be decoded.

    ``names`` are the shards' file names that hold the keys, if known: no other shard is opened. Raises InputError
    if a key is in none.
    """
    holding = {path: about for path, about in find_shards(shards).items() if names is None or path.name in names}
    wanted, found = frozenset(keys), {}
    for index in index_found(holding) if wanted else []:
        for batch in read_batches(index, size=None, channels=3, batch_size=1, keys=wanted):
            found[batch.keys[0]] = None if batch.errors[0] else _shrink(batch.images[0].transpose(1, 2, 0))
    if len(found) != len(wanted):
        raise InputError(
            f"{shards}: key {min(wanted - found.keys())!r} is in none of these shards; give the data set's"
        )
    return found


def sample_grid(source: ShardSpec) -> tuple[str, int, int | None]:
    """A grid of generated images as (data URI, side of one image in pixels or 0, number of images or None).

    ``source`` is a PNG, shown as it is, or shards: then one column per class in label order (up to 12 classes), or
    eight columns; which images is drawn by a hash of their keys, none is chosen by how it looks.
    """
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix.lower() == ".png":
        try:
            data = as_path(source).read_bytes()
        except OSError as error:
            raise InputError(f"{source}: not a readable image ({error})") from error
        if not data.startswith(PNG_MAGIC):
            raise InputError(f"{source}: expected a PNG or shards, found bytes that begin with {data[:8]!r}")
        return _uri(data, "png"), 0, None
    images, labels = _drawn(source)
    rows = _rows_by_class(labels)
    side = images[0].shape[0]
    gap = max(1, side // 14)
    columns = max(map(len, rows))
    sheet = np.zeros((len(rows) * (side + gap) - gap, columns * (side + gap) - gap, 4), np.uint8)
    for y, row in enumerate(rows):
        for x, i in enumerate(row):
            top, left = y * (side + gap), x * (side + gap)
            sheet[top : top + side, left : left + side, :3] = images[i]
            sheet[top : top + side, left : left + side, 3] = 255
    return data_uri(sheet), side, sum(map(len, rows))


def data_uri(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3 or 4] -> a data URI: PNG for small images and for transparent ones, JPEG for the rest."""
    from PIL import Image

    buffer = io.BytesIO()
    if pixels.shape[2] == 3 and max(pixels.shape[:2]) > LOSSLESS:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        return _uri(buffer.getvalue(), "jpeg")
    gray = pixels.shape[2] == 3 and (pixels[..., :1] == pixels).all()
    Image.fromarray(pixels[..., 0] if gray else pixels).save(buffer, "PNG", optimize=True)
    return _uri(buffer.getvalue(), "png")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _shrink(pixels: np.ndarray) -> np.ndarray:
    """A centre square of at most 112 pixels a side; smaller squares as they are."""
    from PIL import Image

    side = min(*pixels.shape[:2], THUMBNAIL)
    if pixels.shape[:2] == (side, side):
        return pixels
    return np.asarray(center_crop(Image.fromarray(np.ascontiguousarray(pixels)), side))


def _drawn(shards: ShardSpec) -> tuple[list[np.ndarray], list[int | None]]:
    """Some images of one size, with labels; a walk in steps could meet the same few classes again and again."""
    indexes = index_shards(shards)
    keys = [key for index in indexes for key in index.samples.keys]
    wanted = frozenset(sorted(keys, key=lambda key: hashlib.blake2b(key.encode()).digest())[:GRID_CANDIDATES])
    images: list[np.ndarray] = []
    labels: list[int | None] = []
    for index in indexes:
        for batch in read_batches(index, size=None, channels=3, batch_size=1, keys=wanted):
            image = None if batch.errors[0] else _shrink(batch.images[0].transpose(1, 2, 0))
            if image is not None and (not images or image.shape == images[0].shape):
                images.append(image)
                labels.append(batch.labels[0])
    if not images:
        raise InputError(f"{shards}: no image that can be decoded; expected generated images")
    return images, labels


def _rows_by_class(labels: list[int | None]) -> list[list[int]]:
    """Positions of images in a grid: a column per class if there are 2 to 12 classes, else eight columns."""
    classes = sorted({label for label in labels if label is not None})
    if None in labels or not 2 <= len(classes) <= 12:
        return [list(range(start, min(start + 8, len(labels)))) for start in range(0, min(48, len(labels)), 8)]
    columns = [[i for i, label in enumerate(labels) if label == one] for one in classes]
    return [[column[y] for column in columns] for y in range(min(6, *map(len, columns)))]

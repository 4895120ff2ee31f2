"""Images and labels out of shards: bytes -> batches, on several threads, strictly.

A sample that cannot be decoded is a failed sample with a reason, never a wrong picture and never the end of the run.
How one image is decoded stands in ``pixels``.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffprune.errors import InputError
from diffprune.pixels import MAX_PIXELS, DecodeError, Decoding, Resizer, center_crop, decode_image
from diffprune.shards import Sample, ShardIndex, ShardReader, ShardSpec, index_shards

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "MAX_PIXELS",
    "Batch",
    "DecodeError",
    "Decoding",
    "Resizer",
    "center_crop",
    "decode_image",
    "decoding_threads",
    "load_images",
    "read_annotations",
    "read_batches",
    "read_image",
]

MAX_IMAGE_BYTES = 256 << 20
MAX_JSON_BYTES = 16 << 20
_MAX_CLS_BYTES = 64
MAX_THREADS = 16


@dataclass
class Batch:
    """Consecutive samples of one shard. Failed samples have zero pixels and an error.

    ``images`` is uint8 [B, C, H, W], a view of rows that lie in memory as decoders write them, [B, H, W, C] (what torch
    calls channels_last); ``labels`` are the integers of ``cls``, None where there is none. ``notes`` say what was wrong
    with an image that decoded all the same, which happens without ``strict`` only.
    """

    samples: list[Sample]
    images: np.ndarray
    labels: list[int | None]
    uids: list[str | None]
    errors: list[str | None]
    notes: list[str | None] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]


def read_batches(
    index: ShardIndex,
    *,
    size: int | Resizer | None,
    channels: int,
    batch_size: int = 256,
    keys: frozenset[str] | None = None,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
    threads: int | None = None,
) -> Iterator[Batch]:
    """Decode a shard batch by batch, in file order; ``keys`` restricts it to these.

    ``size``, ``channels``, ``strict`` and ``max_pixels`` as in ``Decoding``. With ``size=None`` all images of a batch
    must have one size (InputError): use ``batch_size=1`` if they don't. ``threads``: how many decode, by default as
    many as there are cores, at most 16; they are ahead by a batch (or two images per thread, if that is more), which
    bounds memory.
    Raises InputError if the shard is no longer as it was indexed.
    """
    decoding = Decoding(size, channels, strict, max_pixels)
    samples = [sample for sample in index.samples if keys is None or sample.key in keys]
    rows = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    threads = threads or decoding_threads()
    with ShardReader(index.path, index.size, index.version) as reader:
        reader.will_read(_ranges(samples))
        if threads == 1:
            for batch in rows:
                yield _Pending(reader, batch, decoding, None).batch()
            return
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        try:
            pending: deque[_Pending] = deque()
            for batch in rows:
                pending.append(_Pending(reader, batch, decoding, pool))
                if len(pending) > max(1, 2 * threads // batch_size):
                    yield pending.popleft().batch()
            while pending:
                yield pending.popleft().batch()
        finally:  # before the reader is closed
            pool.shutdown(wait=True, cancel_futures=True)


def read_annotations(reader: ShardReader, sample: Sample) -> tuple[int | None, str | None, str | None]:
    """(label, uid, error) of a sample: ``cls`` and the json's uid, None where there is none; why ``cls`` is wrong."""
    try:
        return _read_label(reader, sample), _read_uid(reader, sample), None
    except DecodeError as failure:
        return None, _read_uid(reader, sample), str(failure)


def read_all_annotations(index: ShardIndex) -> tuple[list[int | None], list[str | None], list[str | None]]:
    """(labels, uids, errors) of a shard's samples, as ``read_annotations``; no image is read."""
    with ShardReader(index.path, index.size, index.version) as reader:
        reader.will_read(_annotation_ranges(index.samples))
        rows = [read_annotations(reader, sample) for sample in index.samples]
    return tuple([row[column] for row in rows] for column in range(3))


def load_images(
    shards: ShardSpec,
    *,
    size: int | None,
    channels: int,
    keys: Iterable[str] | None = None,
    strict: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> tuple[pa.Table, np.ndarray]:
    """Read whole shards into memory: (base table, images uint8 [N, C, size, size]), row-aligned, in shard order.

    ``size``, ``channels``, ``strict`` and ``max_pixels`` as in ``Decoding``. ``keys`` restrict it; a key that is in no
    shard raises InputError. Failed samples are in the table with their error, and zero in the array.
    """
    import pyarrow as pa

    from diffprune.tables import base_table

    wanted = None if keys is None else frozenset(keys)
    tables, images = [], []
    for index in index_shards(shards):
        options: dict[str, Any] = {"strict": strict, "max_pixels": max_pixels, "keys": wanted}
        for batch in read_batches(index, size=size, channels=channels, **options):
            columns = (batch.labels, batch.uids, batch.errors, batch.notes)
            tables.append(base_table(index.path.name, batch.samples, *columns))
            images.append(batch.images)
    table = pa.concat_tables(tables) if tables else base_table("", [], [], [], [])
    if wanted is not None and table.num_rows != len(wanted):
        missing = min(wanted.difference(table["key"].to_pylist()))
        raise InputError(f"keys: {missing!r} is in none of the shards")
    if not images:
        return table, np.zeros((0, channels, size or 0, size or 0), np.uint8)
    return table, np.ascontiguousarray(np.concatenate(images))


class _Row(NamedTuple):
    """What a sample gives beside its pixels."""

    label: int | None
    uid: str | None
    error: str | None
    note: str | None


class _Pending:
    """A batch whose samples are being decoded, by the threads of ``pool`` or, without one, when it is asked for."""

    def __init__(self, reader: ShardReader, samples: list[Sample], decoding: Decoding, pool: Executor | None) -> None:
        self.reader, self.samples, self.decoding = reader, samples, decoding
        self.lock = Lock()
        self.images = None if decoding.shape is None else self._room(decoding.shape)
        step = 1 if decoding.shape is None else 16  # small images must not cost more to hand out than to decode
        starts = range(0, len(samples), step)
        self.rows: list[Future[list[_Row]]] | Iterator[list[_Row]]
        if pool is None:
            self.rows = (self._decode(start, start + step) for start in starts)
        else:
            self.rows = [pool.submit(self._decode, start, start + step) for start in starts]

    def batch(self) -> Batch:
        """Wait for the samples, and put them together."""
        rows = [row for part in self.rows for row in (part.result() if isinstance(part, Future) else part)]
        images = self._room((self.decoding.channels, 1, 1)) if self.images is None else self.images
        labels, uids, errors, notes = map(list, zip(*rows, strict=True))
        return Batch(self.samples, images.transpose(0, 3, 1, 2), labels, uids, errors, notes)

    def _room(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Zeros, uint8 [B, H, W, C], for images [C, H, W]."""
        channels, height, width = shape
        return np.zeros((len(self.samples), height, width, channels), np.uint8)

    def _decode(self, start: int, stop: int) -> list[_Row]:
        rows = []
        for place, sample in enumerate(self.samples[start:stop], start=start):
            label, uid, error = read_annotations(self.reader, sample)
            pixels, note = None, None
            if error is None:
                room = None if self.images is None else self.images[place]
                try:
                    pixels, note = self.decoding.decode(read_image(self.reader, sample), room)
                except DecodeError as failure:
                    error = str(failure)
                    if room is not None:
                        room[:] = 0
            if pixels is not None:
                self._keep(place, pixels, room)
            rows.append(_Row(label, uid, error, note))
        return rows

    def _keep(self, place: int, pixels: np.ndarray, room: np.ndarray | None) -> None:
        """Put an image into the batch, whose size is that of the first one that is whole."""
        if room is not None and np.shares_memory(pixels, room):
            return
        with self.lock:
            if self.images is None:
                self.images = self._room(pixels.shape)
        rows = self.images.transpose(0, 3, 1, 2)
        if pixels.shape != rows.shape[1:]:
            raise InputError(
                f"{self.reader.path}: key {self.samples[place].key!r} is {_size(pixels.shape)} pixels, another of the "
                f"same batch {_size(rows.shape[1:])}: give a size, or batch_size=1"
            )
        rows[place] = pixels


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}×{shape[1]}"


def _annotation_ranges(samples: Iterable[Sample]) -> Iterator[tuple[int, int]]:
    """What ``read_annotations`` reads of these samples, as ``ShardReader.will_read`` wants it."""
    for sample in samples:
        for name, limit in (("cls", _MAX_CLS_BYTES), ("json", MAX_JSON_BYTES)):
            if (member := sample.member(name)) is not None and (name == "cls" or member.size <= limit):
                yield member.data_offset, member.data_offset + min(member.size, limit)


def _ranges(samples: Iterable[Sample]) -> Iterator[tuple[int, int]]:
    """What a batch reads of these samples."""
    for sample in samples:
        yield from _annotation_ranges([sample])
        if len(images := sample.images()) == 1 and images[0].size <= MAX_IMAGE_BYTES:
            yield images[0].data_offset, images[0].data_offset + images[0].size


def decoding_threads() -> int:
    """As many as there are cores, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_THREADS)


def read_image(reader: ShardReader, sample: Sample) -> bytes:
    """The bytes of a sample's one image; DecodeError if it has none, several, or one that is too long."""
    images = sample.images()
    if len(images) != 1:
        names = ", ".join(member.name for member in (images or sample.members))
        raise DecodeError(f"expected one jpg, png or webp member, found {len(images)} among: {names}")
    if images[0].size > MAX_IMAGE_BYTES:
        raise DecodeError(f"{images[0].size:,} bytes; expected an image of at most {MAX_IMAGE_BYTES:,}")
    return reader.read(images[0])


def _read_label(reader: ShardReader, sample: Sample) -> int | None:
    member = sample.member("cls")
    if member is None:
        return None
    text = reader.read(member, limit=_MAX_CLS_BYTES)
    if member.size > _MAX_CLS_BYTES:  # the first digits of a number are another number
        raise DecodeError(f"cls: expected an integer, found {member.size:,} bytes, first {text[:20]!r}")
    try:
        label = int(text)
    except ValueError:
        raise DecodeError(f"cls: expected an integer, found {text!r}") from None
    if not 0 <= label < 1 << 31:
        raise DecodeError(f"cls: expected a class number from 0, found {label}")
    return label


def _read_uid(reader: ShardReader, sample: Sample) -> str | None:
    member = sample.member("json")
    if member is None or member.size > MAX_JSON_BYTES:
        return None
    text = reader.read(member)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    uid = fields.get("uid") if isinstance(fields, dict) else None
    return uid if isinstance(uid, str) and re.fullmatch(r"[0-9a-fA-F]{32}", uid) else None

"""A selection's rows as ``prune`` copies them, and whether each lies in the shards where it says."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from diffprune.errors import InputError, short
from diffprune.files import fingerprint
from diffprune.packing import BLOCK
from diffprune.progress import progress
from diffprune.shards import SampleList, ShardIndex, index_each
from diffprune.storage import AnyPath, Stat
from diffprune.tables import read_table, selection_about


@dataclass
class KeptRows:
    """The rows of a kept.parquet in the order of the input: by shard, then by offset."""

    keys: list[str]
    shards: np.ndarray  # [N] int64, positions in the list of input shards
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes

    @classmethod
    def read(cls, kept: str | os.PathLike, sources: Sequence[AnyPath]) -> KeptRows:
        selection_about(kept)
        table = read_table(kept, ["key", "shard", "offset", "size"])
        if not table.num_rows:
            raise InputError(f"{kept}: expected samples to keep, found none")
        if placeless := max(table[name].null_count for name in ("shard", "offset", "size")):
            raise InputError(
                f"{kept}: {placeless} of {table.num_rows} rows have no shard, offset and size, as where a folder of "
                "clip-retrieval was clustered as it is: bind it to the shards first (`diffprune embed SHARDS --model "
                "clip-retrieval:FOLDER -o EMBEDDINGS`), then cluster and select from those"
            )
        if table["key"].null_count:
            raise InputError(f"{kept}: expected a key in every row, found nulls; select again")
        position = {path.name: number for number, path in enumerate(sources)}
        names = table["shard"].combine_chunks().dictionary_encode()
        if absent := [name for name in names.dictionary.to_pylist() if name not in position]:
            raise InputError(
                f"{kept}: {len(absent)} of its {len(names.dictionary)} shards, first {min(absent)!r}, are not among "
                f"the {len(sources)} shards given; give the shards that the selection was made from"
            )
        shards = np.array([position[name] for name in names.dictionary.to_pylist()])[names.indices.to_numpy()]
        offsets, sizes = (table[name].cast(pa.int64()).to_numpy() for name in ("offset", "size"))
        order = np.lexsort((offsets, shards))
        keys = table["key"].take(pa.array(order)).to_pylist()
        if len(set(keys)) != len(keys):
            [(twice, _)] = Counter(keys).most_common(1)
            raise InputError(f"{kept}: key {short(twice)} stands in it twice; select again")
        return cls(keys, shards[order], offsets[order], sizes[order])

    def digest(self) -> str:
        digest = hashlib.blake2b("\0".join(self.keys).encode(), digest_size=16)
        for column in (self.shards, self.offsets, self.sizes):
            digest.update(column.astype("<i8").tobytes())
        return digest.hexdigest()

    def about(self, path: AnyPath, rows: range) -> dict[str, Any]:
        """What the manifest says of a new shard."""
        sizes = self.sizes[rows.start : rows.stop].tolist()
        return {
            "name": path.name,
            "samples": len(rows),
            "bytes": sum(sizes) + 2 * BLOCK,
            "fingerprint": fingerprint([self.keys[rows.start : rows.stop], sizes]),
        }

    def key_at(self, rows: range, position: int) -> str:
        """Of a new shard of these rows, whose sample a byte is in, as a message tells it."""
        row = int(np.searchsorted(np.cumsum(self.sizes[rows.start : rows.stop]), position, side="right"))
        return f" (key {short(self.keys[rows.start + row])})" if row < len(rows) else ""

    def spans(self, rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(shard, begin, end) in bytes of these rows, neighbours joined."""
        span: tuple[int, int, int] | None = None
        for row in rows:
            shard, begin = int(self.shards[row]), int(self.offsets[row])
            end = begin + int(self.sizes[row])
            if span is not None and span[0] == shard and span[2] == begin:
                span = (shard, span[1], end)
                continue
            if span is not None:
                yield span
            span = (shard, begin, end)
        if span is not None:
            yield span


def check_samples(kept: str | os.PathLike, selection: KeptRows, sources: Mapping[AnyPath, Stat]) -> list[int]:
    """How many samples each shard has; InputError unless each key lies just where the selection says."""
    bounds = np.searchsorted(selection.shards, np.arange(len(sources) + 1))
    counts = []
    with progress("check", total=len(sources), unit="shards") as bar:
        for index, start, stop in zip(index_each(sources), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            path = index.path
            if index.damage:
                damage = index.damage[0]
                raise InputError(
                    f"{path}: damaged at byte {damage.offset} (key {damage.key!r}): {damage.message}; {damage.remedy}"
                )
            row = start + _first_misplaced(index.samples, selection, slice(start, stop))
            if row < stop:
                raise _misplaced(kept, index, selection, row)
            counts.append(len(index.samples))
            bar.advance()
    return counts


def _first_misplaced(samples: SampleList, selection: KeptRows, own: slice) -> int:
    """The first of the selection's ``own`` rows that is not just so among a shard's samples; as many as there are."""
    offsets, sizes = samples.spans()
    place = np.searchsorted(offsets, selection.offsets[own])
    wrong = place == len(offsets)
    place[wrong] = 0
    if len(offsets):
        wrong |= (offsets[place] != selection.offsets[own]) | (sizes[place] != selection.sizes[own])
        keys = samples.keys
        pairs = zip(place.tolist(), selection.keys[own], strict=True)
        wrong |= np.array([keys[at] != key for at, key in pairs], bool)
    return int(wrong.argmax()) if wrong.any() else len(wrong)


def _misplaced(kept: str | os.PathLike, index: ShardIndex, selection: KeptRows, row: int) -> InputError:
    key, offset, size = selection.keys[row], int(selection.offsets[row]), int(selection.sizes[row])
    path, samples = index.path, index.samples
    sample = next((other for other in samples if other.key == key), None)
    there = next((f"key {short(other.key)}" for other in samples if other.offset == offset), "no sample")
    where = (
        "and the key nowhere in it" if sample is None else f"and the key at byte {sample.offset} ({sample.size} bytes)"
    )
    return InputError(
        f"{path}: expected key {short(key)} at byte {offset} ({size} bytes), as {kept} says; found {there} there "
        f"{where}; the selection is of another data set: give the shards that it was made from"
    )

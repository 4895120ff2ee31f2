"""``prune``: the samples of a selection into new shards, whole tar members copied byte for byte."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from diffprune.copying import Comparison, Target, copy_ranges, write_all
from diffprune.errors import InputError, short
from diffprune.files import atomic_file, atomic_path, fingerprint, open_file, write_json
from diffprune.locks import folder_lock
from diffprune.packing import BLOCK, brace_pattern, check_prefix
from diffprune.plans import claim_folder
from diffprune.progress import progress
from diffprune.shards import SampleList, ShardIndex, ShardSpec, find_shards, index_each
from diffprune.storage import AnyPath, Stat, as_path
from diffprune.tables import read_table, selection_about

MANIFEST = "prune.json"
WORKERS = 4
# What may lie beside the new shards: class names, and what `export` writes for other tools.
BESIDE = ("classes.json", "_info.json", "index.json", ".nv-meta")


def prune(
    kept: str | Path,
    shards: ShardSpec,
    out: str | Path,
    *,
    shard_size: int | None = None,
    prefix: str | None = None,
    workers: int | None = None,
    verify: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Copy the samples of ``kept`` from ``shards`` into new shards in ``out``.

    Headers (extended ones too), names and data stay as they are, whatever the extensions; samples stay in the order
    of the input. The same inputs give the same bytes, and a run that was stopped goes on where it was.

    Args:
        kept: a selection (kept.parquet) with columns key, shard, offset and size.
        shards: the shards that it was made from: a brace pattern, glob, folder, list file or several of them.
        shard_size: samples per new shard; by default that of the largest input shard.
        prefix: new shards are named ``<prefix>-<number>.tar``; by default like the input, with as many digits.
        workers: shards written at a time, by threads, which mostly wait for the disk.
        verify: in the end read all new shards, those too that were there before, and compare them with the input byte
            by byte; otherwise only sizes of shards that were there are looked at.
        dry_run: check the selection against the shards, say how much would be copied and write nothing.

    ``prune.json`` is written beside the new shards: the plan, and at the end counts and, per new shard, its samples,
    bytes and a fingerprint of its keys and sizes. ``classes.json`` is copied where there is one.

    Returns counts and paths: ``count`` (samples), ``bytes`` (of the new shards), ``shards`` (paths), ``pattern``,
    ``shard_size``, ``written`` and ``present`` (shards), ``samples_in`` and ``shards_in``, ``out``; with ``verify``
    ``verified`` (shards).

    Raises:
        InputError: a shard that is missing, damaged or changed since the selection or while it is copied; a key that
            is not where the selection says (a selection of another data set); an ``out`` that holds other files; a new
            shard that was changed: of another size or, with ``verify``, in any byte.
        ResumeError: ``out`` was begun with another selection, other shards or settings.
    """
    if shard_size is not None and shard_size < 1:
        raise InputError(f"shard_size: expected at least 1 sample, got {shard_size}")
    if workers is not None and workers < 1:
        raise InputError(f"workers: expected at least 1, got {workers}")
    if verify and dry_run:
        raise InputError("verify compares what was written, a dry run writes nothing: give one of the two")
    kept, out = as_path(kept), as_path(out)
    listed = find_shards(shards)
    sources = list(listed)
    listing = [_state(path, about) for path, about in listed.items()]
    selection = _Selection.read(kept, sources)
    sizes = _check_samples(kept, selection, listed)
    shard_size = shard_size or max(sizes)
    number = -(-len(selection.keys) // shard_size)
    paths = [out / name for name in _names(sources, prefix, number)]
    plan = {
        "selection": selection.digest(),
        "shards": fingerprint(listing),
        "shard_size": shard_size,
        "prefix": prefix,
    }
    report = {
        "count": len(selection.keys),
        "bytes": int(selection.sizes.sum()) + number * 2 * BLOCK,
        "samples_in": sum(sizes),
        "shards_in": len(sources),
        "shard_size": shard_size,
        "shards": [str(path) for path in paths],
        "pattern": brace_pattern(paths),
        "out": str(out),
    }
    classes = _classes(sources)
    with nullcontext() if dry_run else folder_lock(out):
        beside = [*BESIDE, *(f"{path.name}.idx" for path in paths)]  # `energon prepare` indexes each shard
        missing = claim_folder(out, MANIFEST, plan, paths, extra=beside, dry_run=dry_run)
        wanted = {path: range(len(selection.keys))[i * shard_size :][:shard_size] for i, path in enumerate(paths)}
        shards_about = [selection.about(path, rows) for path, rows in wanted.items()]
        for path, about in zip(paths, shards_about, strict=True):
            if path not in missing and (found := path.stat().st_size) != about["bytes"]:
                raise InputError(
                    f"{path}: expected {about['bytes']} bytes, found {found}: it was changed; "
                    "delete it and run the same command again"
                )
        report |= {"written": len(missing), "present": len(paths) - len(missing), "dry_run": dry_run}
        if dry_run:
            return report
        if classes is not None:
            with atomic_path(out / "classes.json") as temporary:
                temporary.write_bytes(classes)

        def pour(path: AnyPath, target: Target) -> None:
            """All bytes of a new shard, in order."""
            for source, spans in groupby(selection.spans(wanted[path]), key=lambda span: span[0]):
                copy_ranges(sources[source], [span[1:] for span in spans], target)
                if _state(sources[source]) != listing[source]:
                    raise InputError(f"{sources[source]}: changed while it was copied; select again, then prune again")
            write_all(target, bytes(2 * BLOCK))

        def write(path: AnyPath) -> AnyPath:
            # the manifest, written last, syncs the folder
            with atomic_file(path, buffering=0, sync_folder=False) as file:
                pour(path, file.fileno() if isinstance(path, Path) else file)
            return path

        def compare(path: AnyPath) -> AnyPath:
            with open_file(path) as file:
                comparison = Comparison(file)
                pour(path, comparison)
                if (at := comparison.end()) is not None:
                    raise InputError(
                        f"{path}: byte {at}{selection.key_at(wanted[path], at)} is not as in the shards that it was "
                        "pruned from: it was changed; delete it and run the same command again"
                    )
            return path

        def all_of(title: str, todo: list[AnyPath], work: Callable[[AnyPath], AnyPath]) -> None:
            with progress(title, total=sum(len(wanted[path]) for path in todo), unit="samples") as bar:
                pool = ThreadPoolExecutor(workers or WORKERS)
                try:
                    for done in as_completed([pool.submit(work, path) for path in todo]):
                        bar.advance(len(wanted[done.result()]), note=done.result().name)
                finally:
                    pool.shutdown(cancel_futures=True)

        all_of("prune", [path for path in paths if path in missing], write)
        counts = {name: report[name] for name in ("count", "bytes", "samples_in", "shards_in")}
        write_json(out / MANIFEST, {"fingerprint": fingerprint(plan), "plan": plan, **counts, "shards": shards_about})
        if verify:
            all_of("verify", paths, compare)
            report["verified"] = len(paths)
        return report


@dataclass
class _Selection:
    """The rows of a kept.parquet in the order of the input: by shard, then by offset."""

    keys: list[str]
    shards: np.ndarray  # [N] int64, positions in the list of input shards
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes

    @classmethod
    def read(cls, kept: str | Path, sources: Sequence[AnyPath]) -> _Selection:
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


def _check_samples(kept: str | Path, selection: _Selection, sources: Mapping[AnyPath, Stat]) -> list[int]:
    """How many samples each shard has; InputError unless each key lies just where the selection says."""
    bounds = np.searchsorted(selection.shards, np.arange(len(sources) + 1))
    counts = []
    with progress("check", total=len(sources), unit="shards") as bar:
        for index, start, stop in zip(index_each(sources), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            path = index.path
            if index.damage:
                damage = index.damage[0]
                raise InputError(
                    f"{path}: damaged at byte {damage.offset} (key {damage.key!r}): {damage.message}; "
                    "fetch or pack this shard again"
                )
            row = start + _first_misplaced(index.samples, selection, slice(start, stop))
            if row < stop:
                raise _misplaced(kept, index, selection, row)
            counts.append(len(index.samples))
            bar.advance()
    return counts


def _first_misplaced(samples: SampleList, selection: _Selection, own: slice) -> int:
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


def _misplaced(kept: str | Path, index: ShardIndex, selection: _Selection, row: int) -> InputError:
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


def _names(sources: Sequence[AnyPath], prefix: str | None, number: int) -> list[str]:
    """File names like the input's: what stands before the number, and as many digits."""
    parts = [re.fullmatch(r"(.*?)(\d*)", path.stem, re.DOTALL).groups() for path in sources]
    width = max(len(digits) for _, digits in parts) or 6
    begins = sorted({begin for begin, _ in parts})
    if prefix is None and len(begins) > 1:
        raise InputError(f"the shards' names begin in {len(begins)} ways ({', '.join(begins[:3])}); give a prefix")
    if prefix is not None:
        check_prefix(prefix)
    begin = f"{prefix}-" if prefix is not None else begins[0] if parts[0][1] else f"{begins[0]}-"
    width = max(width, len(str(number - 1)))
    return [f"{begin}{index:0{width}d}.tar" for index in range(number)]


def _state(path: AnyPath, about: Stat | None = None) -> list[Any]:
    """What is another one when a shard has changed. ``about``: what storage said of it just now, if it was asked."""
    if isinstance(path, Path):
        on_disk = path.stat()
        return [path.name, on_disk.st_size, on_disk.st_mtime_ns]
    return [path.name, *(about or path.stat())]


def _classes(sources: Sequence[AnyPath]) -> bytes | None:
    """The classes.json beside the shards, if there is one."""
    found = {path.parent / "classes.json": None for path in sources}
    texts = {path: path.read_bytes() for path in found if path.is_file()}
    if len(set(texts.values())) > 1:
        raise InputError(f"{' and '.join(map(str, texts))} name different classes; prune their shards one by one")
    return next(iter(texts.values()), None)

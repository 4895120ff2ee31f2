"""``prune``: the samples of a selection into new shards, whole tar members copied byte for byte."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from diffprune.copying import Comparison, Target, copy_ranges, write_all
from diffprune.errors import InputError
from diffprune.files import atomic_file, atomic_path, fingerprint, open_file, write_json
from diffprune.kept_rows import KeptRows, check_samples
from diffprune.locks import folder_lock
from diffprune.packing import BLOCK, brace_pattern, check_prefix
from diffprune.plans import claim_folder
from diffprune.progress import progress
from diffprune.shards import ShardSpec, find_shards
from diffprune.storage import AnyPath, Stat, as_path, stats

MANIFEST = "prune.json"
WORKERS = 4
# What may lie beside the new shards: class names, and what `export` writes for other tools.
BESIDE = ("classes.json", "_info.json", "index.json", ".nv-meta")


def prune(
    kept: str | os.PathLike,
    shards: ShardSpec,
    out: str | os.PathLike,
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
    selection = KeptRows.read(kept, sources)
    sizes = check_samples(kept, selection, listed)
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
        present = stats(path for path in paths if path not in missing)
        for path, about in zip(paths, shards_about, strict=True):
            if path not in missing and (found := present[path].st_size) != about["bytes"]:
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

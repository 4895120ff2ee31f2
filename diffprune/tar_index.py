"""Where each sample lies in a tar: one pass over the 512-byte headers, every byte accounted for.

``tarfile`` takes a broken or missing header for the end of the archive. Here a header's checksum, the two closing
zero blocks and the bytes after them are all checked, and what does not add up is told as Damage.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np

from diffprune.tar_headers import (
    SMALL,
    SPARSE,
    checksum_is_right,
    is_number,
    name_of,
    number_of,
    pax_fields,
    stamp_of,
    text_of,
)
from diffprune.tar_members import Members, RawMember, new_members
from diffprune.tar_samples import BLOCK, SampleList, padded

Read = Callable[[int, int], bytes]  # offset, size -> the bytes there, fewer at the end of the file


@dataclass(frozen=True)
class Damage:
    """What does not add up in a shard, and where (byte offset)."""

    offset: int
    key: str | None
    message: str
    remedy: str = "fetch or pack this shard again"


def index_tar(
    read: Read, size: int, windows: tuple[int, int, int] | None = None, members: Members | None = None
) -> tuple[SampleList, list[Damage], list[str]]:
    """(samples, damage by offset, names that are no samples: links, devices, ``__meta__``) of a tar of ``size`` bytes.

    ``windows``: bytes read at a time, where headers lie close together and where the next one is further away than the
    third number; by default what suits a local disk. ``members``: an empty collection of them, by default the fastest.

    Samples are grouped as webdataset groups them: the key is the name up to the first dot of its last part (folders
    included), consecutive members of one key are one sample, extensions are lower-cased.
    """
    scan = _Scan(read, size, windows or (_NEAR, _FAR, _GAP), new_members() if members is None else members)
    scan.run()
    samples, grouping_damage = scan.members.samples(), []
    if samples is None:
        samples, grouping_damage = _group(scan.members.all(), scan.ignored)
    return samples, sorted(scan.damage + grouping_damage, key=lambda d: d.offset), scan.ignored


_NEAR = 128 << 10  # bytes read at a time where headers lie close together
_FAR = 4 << 10  # and where the next header is further away than _GAP, so that images are not read for nothing
_GAP = 16 << 10
_RECORD = 20 * BLOCK  # what tar pads an archive to by default
_MAX_EXTENDED_HEADER = 1 << 20
_REGULAR, _OLD_REGULAR, _CONTIGUOUS, _FOLDER = b"0\x0075"
_WITHOUT_DATA = frozenset(b"123456")  # links, devices, folders, FIFOs, whatever their size field says
_EXTENDED = frozenset(b"LKxXg")
_NUMBERS: tuple[tuple[str, int, int], ...]
_NUMBERS = (("mode", 100, 108), ("uid", 108, 116), ("gid", 116, 124), ("mtime", 136, 148))
_NUMBERS += (("devmajor", 329, 337), ("devminor", 337, 345))
_DECIMAL = re.compile(r"[0-9]{1,19}")


@dataclass
class _Extended:
    """What extended headers say about the member after them."""

    offset: int
    name: str | None = None
    size: int | None = None
    sparse: bool = False
    crc: int = 0  # of all that they say

    def take(self, name: str | None, size: int | None) -> None:
        """Of several that say it the first counts, as for tarfile."""
        self.name = name if self.name is None else self.name
        self.size = size if self.size is None else self.size


@dataclass
class _Scan:
    """A walk from header to header. A damaged header ends it: where the next one is, is unknown then."""

    read: Read
    size: int
    windows: tuple[int, int, int]
    members: Members
    damage: list[Damage] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    extended: _Extended | None = None

    def run(self) -> None:
        offset, base, window, widest = 0, 0, b"", 0  # the widest gap between headers since the last read
        near, far, apart = self.windows
        sums: dict[bytes, int] = {}
        while True:
            known = base + len(window)
            if offset + BLOCK > known or offset + BLOCK + SMALL > known < self.size:  # a header, and data for its stamp
                base, window, widest = offset, self.read(offset, far if widest > apart else near), 0
                if len(window) < BLOCK:
                    self._tell(offset, None, "the file ends where a header or the closing zero blocks should be: cut")
                    break
            if self.extended is None:
                end, gap = self.members.take(window, base, offset, self.size)
                if end > offset:
                    offset, widest = end, max(widest, gap)
                    continue
            header = window[offset - base : offset - base + BLOCK]
            if not header[0] and not header.strip(b"\0"):
                self._end(offset)
                break
            if not checksum_is_right(header, sums):
                self._tell(offset, None, "a tar header whose checksum is wrong: damaged")
                break
            end = self._unusual(offset, header, window[offset - base + BLOCK :][:SMALL])
            if not end:
                break
            widest = max(widest, end - offset)
            offset = end

    def _unusual(self, offset: int, header: bytes, behind: bytes) -> int:
        """Take any header that is not a plain file's; returns where the next one is, or 0 if that is unknown.

        ``behind``: what is known of the bytes behind it.
        """
        length, kind, body = number_of(header[124:136]), header[156], offset + BLOCK
        if length is None:
            self._tell(offset, None, "not a tar header: its size field is no number")
            return 0
        for name, start, end in _NUMBERS:
            if not is_number(header[start:end]):
                self._tell(offset, None, f"not a tar header: its {name} field is no number")
                return 0
        self.members.trust(header)
        if kind in _EXTENDED:
            return self._extend(offset, kind, length)
        extended, self.extended = self.extended or _Extended(offset), None
        name = name_of(header) if extended.name is None else extended.name
        if kind not in _WITHOUT_DATA and extended.size is not None:
            length = extended.size
        is_folder = kind == _FOLDER or (kind == _OLD_REGULAR and header[:100].partition(b"\0")[0].endswith(b"/"))
        if is_folder or kind in _WITHOUT_DATA:
            length = 0
        if kind == SPARSE:  # blocks of a map of holes come before the data
            more = header[482]
            while more:
                block = self.read(body, BLOCK)
                body, more = body + BLOCK, block[504] if len(block) == BLOCK else 0
        if body + length > self.size:
            left = max(self.size - body, 0)
            self._tell(extended.offset, name, f"its data should be {length:,} bytes, {left:,} are left: it was cut")
            return 0
        if name is None:
            self._tell(extended.offset, None, "its name is not UTF-8")
        elif kind == SPARSE or extended.sparse:
            self._tell(extended.offset, name, "a sparse member, whose data are not in one piece; pack it again")
        elif is_folder:
            pass
        elif kind in (_REGULAR, _OLD_REGULAR, _CONTIGUOUS):
            data = behind[:length] if length <= SMALL else b""
            if len(data) < length <= SMALL:
                data = self.read(body, length)
            self.members.add(name, extended.offset, body, length, stamp_of(header, data, extended.crc))
        else:
            self.ignored.append(f"{name} (tar type {chr(kind)!r}, not a regular file)")
        return body + padded(length)

    def _extend(self, offset: int, kind: int, length: int) -> int:
        """Take a header whose data are about the next member: a GNU long name or link, or pax records."""
        body = offset + BLOCK
        if self.extended is None:
            self.extended = _Extended(offset)
        data = self.read(body, padded(length)) if length <= _MAX_EXTENDED_HEADER else b""
        if len(data) < length:
            self._tell(offset, None, f"an extended header of {length:,} bytes: damaged or cut")
            return 0
        data, padding = data[:length], data[length:]
        self.extended.crc = crc32(data, self.extended.crc)
        if padding.strip(b"\0"):  # which tarfile reads too, and stops at
            self._tell(offset, None, "an extended header whose padding is not zeros: damaged")
            return 0
        if kind == ord("L"):
            name = text_of(data.rstrip(b"\0"))
            if name is None:
                self._tell(offset, None, "a long name that is not UTF-8")
                return 0
            self.extended.take(name, None)
        elif kind in b"xXg":
            fields = pax_fields(data)
            size = None if fields is None else fields.get("size", "0")
            if fields is None or size is None or not _DECIMAL.fullmatch(size):
                self._tell(offset, None, "a malformed pax header")
                return 0
            sparse = any(name.startswith("GNU.sparse.") for name in fields)
            if kind == ord("g"):  # about all members from here on: fine for comments and times
                if sparse or "path" in fields or "size" in fields:
                    self._tell(offset, None, "a global pax header that sets names or sizes")
                    return 0
            else:
                self.extended.sparse |= sparse
                self.extended.take(fields.get("path"), int(size) if "size" in fields else None)
        return body + padded(length)

    def _end(self, offset: int) -> None:
        """The archive must close with two zero blocks, and nothing but a record's zeros may follow them."""
        if self.extended is not None:
            self._tell(self.extended.offset, self.extended.name, "an extended header without its member")
        if offset + 2 * BLOCK > self.size:
            self._tell(offset, None, "one closing zero block instead of two: the file was cut")
            return
        end, zeros = offset, bytes(1 << 20)
        while chunk := self.read(offset, len(zeros)):
            if chunk != zeros[: len(chunk)]:
                stray = offset + len(chunk) - len(chunk.lstrip(b"\0"))
                self._tell(end, None, f"a zeroed header, and data at {stray:,}: wiped, or two archives in one file")
                return
            offset += len(chunk)
        if self.size - end > 2 * BLOCK + _RECORD:
            message = (
                f"{self.size - end:,} zero bytes end the archive, where tar writes at most {2 * BLOCK + _RECORD:,}: "
                f"filled by a broken copy? If it has a larger blocking factor, cut it to {end + 2 * BLOCK} bytes"
            )
            self._tell(end, None, message)

    def _tell(self, offset: int, name: str | None, message: str) -> None:
        self.damage.append(Damage(min(offset, self.size), name, message))  # the file may end in a member's padding


# --- samples ---------------------------------------------------------------------------------------------------

_WEBDATASET_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$", re.DOTALL)
_WEBDATASET_META = re.compile(r"^__[^/]*__($|/)")


def _group(members: list[RawMember], ignored: list[str]) -> tuple[SampleList, list[Damage]]:
    """Consecutive members of one key are a sample; a key that comes back, or an extension twice, is damage."""
    damage: list[Damage] = []
    seen: set[str] = set()
    key: str | None = None
    extensions: list[str] = []
    end = 0
    keys: list[str] = []
    first: list[int] = []
    spelt: dict[str, tuple[int, str]] = {}  # extension -> its number, and it in lower case
    kept: list[tuple[int, int, int, int, int]] = []
    for name, header_offset, data_offset, length, stamp in members:
        if name.startswith("__") and _WEBDATASET_META.match(name):
            ignored.append(f"{name} (webdataset skips what is below a folder named like this)")
            continue
        slash = name.rfind("/")
        dot = name.find(".", slash + 1)
        if dot > slash + 1:
            member_key, spelling = name[:dot], name[dot + 1 :]
        elif odd := _WEBDATASET_NAME.match(name):  # such as "a/.b", which webdataset takes for "a/" and "b"
            member_key, spelling = odd.groups()
        else:
            damage.append(Damage(header_offset, name, "a name without an extension belongs to no sample"))
            continue
        if not name.isprintable() and any(ord(character) < 32 for character in name):
            damage.append(Damage(header_offset, member_key, "a name with control characters"))
            continue
        code, extension = spelt.get(spelling) or spelt.setdefault(spelling, (len(spelt), spelling.lower()))
        if member_key != key:
            key, extensions = member_key, []
            keys.append(key)
            first.append(len(kept))
            if key in seen:
                message = "this key stood earlier in the shard: a duplicate, or interleaved samples"
                damage.append(Damage(header_offset, key, message))
            seen.add(key)
        elif extension in extensions:
            message = f"a second .{extension} under the same key: two samples with one key"
            damage.append(Damage(header_offset, key, message))
            continue
        elif end != header_offset:
            damage.append(Damage(header_offset, key, "its members do not follow each other"))
        kept.append((code, header_offset, data_offset, length, stamp))
        extensions.append(extension)
        end = data_offset + length + -length % BLOCK
    return SampleList(keys, first, list(spelt), np.array(kept, np.int64).reshape(-1, 5).T), damage

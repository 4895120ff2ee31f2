"""The members of a tar, and the walk over plain files' headers: in C++ (csrc/cpu/tar_members.h) where that was built,
else in Python. C++ takes no header that Python does not take; the others, and every complaint, are ``tar_index``'s.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from diffprune.tar_headers import SMALL, checksum_is_right, stamp_of
from diffprune.tar_samples import BLOCK, SampleList, padded

RawMember = tuple[str, int, int, int, int]  # name, header offset, data offset, size, stamp

_REGULAR = ord("0")
_MOST_OWNERS = 10_000


class Members(Protocol):
    """Members in file order."""

    def take(self, window: bytes, base: int, offset: int, size: int) -> tuple[int, int]:
        """Take plain files' headers, as nearly all are, from ``offset`` of a file of ``size`` bytes on, while they lie
        in ``window``, which begins at ``base``; stop at any other header, even if it may turn out to be a plain file's.

        Returns the offset of the next header, and the widest gap between those taken.
        """
        ...

    def add(self, name: str, header_offset: int, data_offset: int, size: int, stamp: int) -> None:
        """A member whose header was looked at elsewhere; ``stamp``: see ``tar_headers.stamp_of``."""
        ...

    def trust(self, header: bytes) -> None:
        """The mode, owner and device fields of this header are right: others with the same are plain from now on."""
        ...

    def samples(self) -> SampleList | None:
        """All as samples, or None where something may be odd: ``all`` has to be looked at then."""
        ...

    def all(self) -> list[RawMember]:
        """All, in file order."""
        ...


def new_members() -> Members:
    """An empty collection of the fastest kind."""
    return _CppMembers() if _compiled() else PythonMembers()


@cache
def _compiled() -> type | None:
    """``TarMembers`` of csrc/cpu/tar_members.h; None where it was not built."""
    if find_spec("diffprune._cpu") is None:
        return None
    try:
        found = import_module("diffprune._cpu").TarMembers
        if "stamp" not in (found.add.__doc__ or ""):
            raise ImportError("its tar members have no stamps")
        return found
    except (ImportError, AttributeError) as error:
        message = (
            f"diffprune._cpu was built for another machine or version ({error}): install again; tars are read slowly"
        )
        warnings.warn(message, stacklevel=2)
        return None


class PythonMembers:
    """What csrc/cpu/tar_members.cpp does, in as few operations as Python can."""

    def __init__(self) -> None:
        self._members: list[RawMember] = []
        self._owners: set[tuple[bytes, bytes]] = set()
        self._sums: dict[bytes, int] = {}

    def take(self, window: bytes, base: int, offset: int, size: int) -> tuple[int, int]:
        widest, start = 0, offset - base
        while start + BLOCK <= len(window):
            header = window[start : start + BLOCK]
            digits, time = header[124:135], header[136:147]
            name_end = header.find(0)
            if (
                header[156] != _REGULAR
                or header[345]
                or header[135] not in b"\0 "
                or header[147] not in b"\0 "
                or not digits.isdigit()
                or not time.isdigit()
                or name_end > 100
                or (header[100:124], header[329:345]) not in self._owners
                or not checksum_is_right(header, self._sums)
            ):
                break
            try:
                name, length, _ = str(header[:name_end], "utf-8"), int(digits, 8), int(time, 8)
            except ValueError:  # no UTF-8, or an 8 or 9
                break
            body = base + start + BLOCK
            data = window[start + BLOCK : start + BLOCK + length] if length <= SMALL else b""
            if body + length > size or (length <= SMALL and len(data) < length):
                break
            self._members.append((name, base + start, body, length, stamp_of(header, data)))
            step = BLOCK + padded(length)
            widest = max(widest, step)
            start += step
        return base + start, widest

    def add(self, name: str, header_offset: int, data_offset: int, size: int, stamp: int) -> None:
        self._members.append((name, header_offset, data_offset, size, stamp))

    def trust(self, header: bytes) -> None:
        if len(self._owners) < _MOST_OWNERS:
            self._owners.add((header[100:124], header[329:345]))

    def samples(self) -> None:
        return None

    def all(self) -> list[RawMember]:
        return self._members


class _CppMembers:
    def __init__(self) -> None:
        self._found: Any = _compiled()()
        self.take, self.add, self.trust, self.all = (
            self._found.take,
            self._found.add,
            self._found.trust,
            self._found.members,
        )

    def samples(self) -> SampleList | None:
        found = self._found.grouped()
        if found is None:
            return None
        keys, ends, first, extensions, codes, places = found
        offsets = np.concatenate([[0], np.frombuffer(ends, np.int64)])
        keys = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(keys))
        *places, stamps = places
        members = [np.frombuffer(codes, np.int32), *(np.frombuffer(column, np.int64) for column in places)]
        members.append(np.frombuffer(stamps, np.uint32))
        return SampleList(keys, np.frombuffer(first, np.int64), extensions, members)

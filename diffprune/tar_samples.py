"""The samples of one shard, in a few arrays: some 90 bytes each, so that one process can index 100 million images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import add, eq
from typing import NamedTuple, TypeVar, overload

import numpy as np
import pyarrow as pa

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")

Size = TypeVar("Size", int, np.ndarray)

_AT_A_TIME = 1024  # samples that become objects together


class Member(NamedTuple):
    """One file in a tar. Offsets and size are bytes from the start of the tar."""

    name: str
    extension: str
    header_offset: int  # of its first header, extended (pax, GNU long name) ones included
    data_offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header begins: after the data's padding to 512 bytes."""
        return self.data_offset + padded(self.size)


@dataclass(frozen=True, slots=True)
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
        for member in self.members:
            if member.extension in extensions:
                return member
        return None

    def images(self) -> list[Member]:
        """Members that are images by their extension's last part."""
        return [m for m in self.members if m.extension.rpartition(".")[2] in IMAGE_EXTENSIONS]


class SampleList(Sequence[Sample]):
    """Samples in file order, each made when it is asked for. Equal to any sequence of the same samples."""

    def __init__(
        self,
        keys: Sequence[str],
        first: Sequence[int] | np.ndarray,
        extensions: Sequence[str],
        members: Sequence[Sequence[int] | np.ndarray] | np.ndarray,
    ) -> None:
        """``first`` [n]: the number of each sample's first member, from 0.

        ``members``: five columns, for each member the number of its extension, as it is spelt, in ``extensions``;
        then its header's offset, its data's, its size, and its stamp, see ``tar_headers.stamp_of``.
        """
        codes, *places, stamps = members
        self._keys = pa.array(keys, pa.large_string())
        self._first = np.append(np.asarray(first, np.int64), len(codes))
        self._spelt = list(extensions)
        self._extensions = [extension.lower() for extension in extensions]
        self._codes = np.asarray(codes, np.int32)
        self._places = np.asarray(places, np.int64)
        self._stamps = np.asarray(stamps, np.uint32)
        self._numbers: Sequence[int] = range(len(self._keys))

    @classmethod
    def empty(cls) -> SampleList:
        return cls([], [], [], [[], [], [], [], []])

    @classmethod
    def of_table(cls, table: pa.Table) -> SampleList:
        """The inverse of `table`."""
        number = table["sample"].to_numpy()
        first = np.flatnonzero(np.diff(number, prepend=-1))
        extension = table["extension"].combine_chunks().dictionary_encode()
        places = [table[name].to_numpy() for name in ("header_offset", "data_offset", "size", "stamp")]
        keys = table["key"].combine_chunks().take(pa.array(first))
        return cls(keys, first, extension.dictionary.to_pylist(), [extension.indices.to_numpy(), *places])

    def table(self) -> pa.Table:
        """A row for each member: its sample's number and key, its extension as it is spelt, offsets, size and stamp."""
        number = np.repeat(np.arange(len(self)), np.diff(self._first))
        header_offset, data_offset, size = self._places
        columns = {
            "sample": number,
            "key": self._keys.take(pa.array(number)),
            "extension": pa.array(self._spelt, pa.string()).take(pa.array(self._codes)),
            "header_offset": header_offset,
            "data_offset": data_offset,
            "size": size,
            "stamp": self._stamps,
        }
        return pa.table(columns)

    @property
    def keys(self) -> list[str]:
        """All keys, in order."""
        return self._keys.to_pylist()

    @property
    def key_column(self) -> pa.Array:
        """The same as ``large_string``."""
        return self._keys

    def digest(self) -> str:
        """32 hex digits that identify names, places, times of change and small data; the order of members counts."""
        extensions = [self._spelt[code] for code in self._codes.tolist()]
        found = hashlib.sha256(json.dumps([self.keys, extensions]).encode())
        for column in (self._first, self._places, self._stamps):
            found.update(np.ascontiguousarray(column).astype(np.int64).tobytes())
        return found.hexdigest()[:32]

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Each sample's offset, ascending, and size: [n] int64."""
        header_offset, data_offset, size = self._places
        offset, last = header_offset[self._first[:-1]], self._first[1:] - 1
        return offset, data_offset[last] + padded(size[last]) - offset

    def only(self, keys: Set[str]) -> SampleList:
        """Those of these keys, with the numbers that they have here."""
        rows = [row for row, key in enumerate(self.keys) if key in keys]
        lengths = np.diff(self._first)
        kept = np.zeros(len(self), bool)
        kept[rows] = True
        members = np.repeat(kept, lengths)
        first = np.cumsum(lengths[rows]) - lengths[rows]
        columns = [self._codes[members], *self._places[:, members], self._stamps[members]]
        found = SampleList(self._keys.take(pa.array(rows, pa.int64())), first, self._spelt, columns)
        found._numbers = [self._numbers[row] for row in rows]
        return found

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _AT_A_TIME):
            yield from self._between(start, min(start + _AT_A_TIME, len(self)))

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...

    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        numbers = range(len(self))[place]
        if isinstance(numbers, int):
            return self._between(numbers, numbers + 1)[0]
        return [self._between(number, number + 1)[0] for number in numbers]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} samples>"

    def _between(self, start: int, end: int) -> list[Sample]:
        keys = self._keys[start:end].to_pylist()
        first = self._first[start : end + 1]
        own = slice(first[0], first[-1])
        codes = self._codes[own].tolist()
        lengths = np.diff(first).tolist()
        begins = [f"{key}." for key, length in zip(keys, lengths, strict=True) for _ in range(length)]
        names = map(add, begins, map(self._spelt.__getitem__, codes))
        extensions = map(self._extensions.__getitem__, codes)
        # Straight to tuple's: a class' own call would be half of the time that an index takes to become objects.
        new_member = partial(tuple.__new__, Member)
        members = map(new_member, zip(names, extensions, *self._places[:, own].tolist(), strict=True))
        numbers = self._numbers[start:end]
        return [
            Sample(key, number, tuple(islice(members, length)))
            for key, number, length in zip(keys, numbers, lengths, strict=True)
        ]


def padded(size: Size) -> Size:
    """``size`` bytes, or each of them, with what fills the last block of a tar."""
    return -(-size // BLOCK) * BLOCK

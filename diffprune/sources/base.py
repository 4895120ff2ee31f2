"""What every source is, and the rules for keys."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from diffprune.errors import InputError

_UNSAFE = re.compile(r"[^\w+=@~,-]")


@dataclass(frozen=True)
class SourceImage:
    """One image as it comes from a source; ``origin`` says where from, for error messages."""

    key: str
    label: int
    data: bytes
    origin: str


class Source:
    """Rows of (key, label), read in any order."""

    kind: str
    name: str  # default shard prefix
    class_names: list[str]
    keys: list[str]
    identity: str  # digest of the listing: another one means other bytes
    skipped: int = 0
    encodes: bool = False  # whether read() makes the image bytes itself

    def order(self, seed: int | None) -> np.ndarray:
        """Rows, [N] int64, in the order to pack: by a random number of each key, or as listed for None."""
        return np.arange(len(self.keys)) if seed is None else random_order(self.keys, seed)

    def read(self, rows: Sequence[int] | np.ndarray) -> Iterator[SourceImage]:
        """The images of these rows, in this order."""
        raise NotImplementedError


def image_extension(data: bytes) -> str | None:
    """ "png", "jpg" or "webp" by the first 12 bytes, or None."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def safe_key(path: str) -> str:
    """A sample key from a relative path with an extension: the extension dropped, unsafe characters as ``_``."""
    return "/".join(safe_name(part) for part in os.path.splitext(path)[0].split("/"))


def safe_name(name: str) -> str:
    """``name`` in NFC with whatever is no letter, digit or one of ``_ + = @ ~ , -`` replaced by ``_``."""
    return _UNSAFE.sub("_", unicodedata.normalize("NFC", name)) or "_"


def random_order(keys: Sequence[str], seed: int) -> np.ndarray:
    """Rows in random order, [N] int64: sorted by a number drawn for (seed, key), so no other key plays a part."""
    from diffprune.draws import uniform

    return np.argsort(uniform(seed, keys, "pack").numpy(), kind="stable")


def check_collisions(keys: Sequence[str], origin: Callable[[int], str]) -> None:
    """Raise InputError naming both origins if two rows have one key; ``origin`` maps a row to where it is from."""
    if len(set(keys)) == len(keys):
        return
    first: dict[str, int] = {}
    for row, key in enumerate(keys):
        if first.setdefault(key, row) != row:
            raise InputError(
                f"{origin(first[key])} and {origin(row)} would both have the key {key!r}; rename one of them"
            )

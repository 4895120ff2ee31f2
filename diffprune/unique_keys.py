"""Keys that stand twice, found at 8 bytes a key: hashes first, and of equal hashes alone the keys themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

_AT_A_TIME = 1 << 16  # keys that are Python's strings together


def first_repeated(lengths: Sequence[int], keys: Callable[[int], list[str]]) -> tuple[str, int, int] | None:
    """The first key that stands somewhere for the second time, the part where it first stood and that part, or None.

    ``keys(i)``: those of part i, ``lengths[i]`` of them; asked for twice where hashes are equal.
    """
    hashes = np.empty(sum(lengths), np.int64)
    end = 0
    for part, length in enumerate(lengths):
        start, end = end, end + length
        hashes[start:end] = [hash(key) for key in keys(part)]
    hashes.sort()
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    seen: dict[str, int] = {}
    for part in range(len(lengths)) if twice else ():
        for key in keys(part):
            if hash(key) in twice:
                if key in seen:
                    return key, seen[key], part
                seen[key] = part
    return None


def repeated_key(keys: pa.ChunkedArray) -> str | None:
    """The first key of a column that stands in it for the second time, or None."""
    parts = [chunk.slice(start, _AT_A_TIME) for chunk in keys.chunks for start in range(0, len(chunk), _AT_A_TIME)]
    found = first_repeated([len(part) for part in parts], lambda part: parts[part].to_pylist())
    return None if found is None else found[0]

"""Keys that stand twice, found at 9 bytes a key: hashes first, and of equal hashes alone the keys themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from diffprune.rank_talk import ALONE, RankTalk

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


def told_twice(keys: pa.ChunkedArray, talk: RankTalk = ALONE) -> str | None:
    """What is to be said of a key that stands twice among those of all processes, if there is one.

    With several processes digests are compared, 16 bytes a key.
    """
    if talk.size == 1:
        twice = repeated_key(keys)
        return None if twice is None else f"key {twice!r} stands in it twice"
    import torch

    digests = [hashlib.blake2b(key.as_py().encode(), digest_size=16).digest() for key in keys]
    own = np.frombuffer(b"".join(digests), dtype=np.int64).reshape(-1, 2)
    here = []  # each process looks at the digests that fall to it, of all
    for rank in range(talk.size):
        told = talk.tell(torch.from_numpy(own.copy()), rank).numpy()
        here.append(told[told[:, 0] % talk.size == talk.rank])
    found, counts = np.unique(np.concatenate(here), axis=0, return_counts=True)
    repeated = talk.gather(torch.from_numpy(found[counts > 1]))
    if not len(repeated):
        return None
    bad = {row.tobytes() for row in repeated.numpy()}
    key = next((keys[i].as_py() for i, digest in enumerate(digests) if digest in bad), None)
    return "a key of other processes stands in it twice" if key is None else f"key {key!r} stands in it twice"

"""What is held out, and the long tail: selections of shards that are made before anything looks at an image."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pyarrow as pa

from diffprune._version import __version__
from diffprune.decode import read_all_annotations
from diffprune.draws import uniform
from diffprune.errors import InputError
from diffprune.shards import ShardSpec, index_shards
from diffprune.tables import base_table, write_table


def split_samples(
    shards: ShardSpec,
    train: str | os.PathLike,
    held_out: str | os.PathLike,
    *,
    share: float,
    skew: float = 1.0,
    seed: int = 0,
) -> tuple[int, int]:
    """Write two selections of ``shards``: what may be trained on, and what is held out; return their counts.

    Of each class (samples without a label are one) the ``share`` whose keys come first in a seeded order is held out,
    rounded half up, and the first of what is left may be trained on: all of it, or with ``skew`` > 1 a long tail, as
    ``long_tail`` says. Both depend on the keys, labels and seed alone. A selection that would be empty is not written.

    Raises InputError if nothing may be trained on, or for a long tail of samples without labels.
    """
    indexes = index_shards(shards)
    table = pa.concat_tables(
        base_table(index.path.name, index.samples, *read_all_annotations(index)) for index in indexes
    )
    labels = np.array([-1 if label is None else label for label in table["label"].to_pylist()], dtype=np.int64)
    classes, group = np.unique(labels, return_inverse=True)
    if skew > 1 and (len(classes) < 2 or classes[0] < 0):
        raise InputError(f"{shards}: data.skew makes a long tail of classes: expected labels, of two classes or more")
    keys = table["key"].to_pylist()
    place = uniform(seed, keys, "held out").numpy()
    order = np.lexsort((np.array(keys), place, group))
    starts = np.searchsorted(group[order], np.arange(len(classes) + 1))
    members = [order[begin:end] for begin, end in pairwise(starts)]
    cuts = [int(share * len(rows) + 0.5) for rows in members]
    out = np.concatenate([rows[:cut] for rows, cut in zip(members, cuts, strict=True)])
    left = [rows[cut:] for rows, cut in zip(members, cuts, strict=True)]
    sizes = long_tail([len(rows) for rows in left], skew)
    kept = np.concatenate([rows[:size] for rows, size in zip(left, sizes, strict=True)])
    if not len(kept):
        raise InputError(f"{shards}: data.held_out = {share} leaves nothing to train on")
    columns = ["key", "shard", "offset", "size"]
    for path, rows in ((train, kept), (held_out, out)):
        if len(rows):
            about = {"stage": "select", "version": __version__, "order": "split", "count": len(rows), "seed": seed}
            write_table(path, table.select(columns).take(pa.array(np.sort(rows))), about)
    return len(kept), len(out)


def long_tail(sizes: list[int], skew: float) -> list[int]:
    """How many of each class to keep: of class r of C, ``skew ** (-r / (C - 1))`` times the smallest class's size.

    So the first class keeps ``skew`` times as many as the last one, whatever the sizes were; a ratio of 1 keeps all.
    """
    if skew == 1:
        return sizes
    most = min(sizes)
    return [int(most * skew ** (-rank / (len(sizes) - 1)) + 0.5) for rank in range(len(sizes))]

"""Which images go into which metric."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.context import common_embedder
from diffprune.evaluation.folders import FeatureFolder
from diffprune.storage import as_path
from diffprune.tables import kept_keys


def training_rows(seen: FeatureFolder, kept: str | os.PathLike | None) -> np.ndarray:
    """Which rows [M] bool the generator was trained on."""
    rows = seen.rows
    if kept is None:
        return np.ones(len(rows), dtype=bool)
    kept = as_path(kept)
    keys = kept_keys(kept)
    if not keys:
        raise InputError(f"{kept}: an empty selection; there is nothing the generator could be trained on")
    trained_on = pc.is_in(rows["key"], value_set=pa.array(sorted(keys), pa.string())).to_numpy()
    if trained_on.sum() != len(keys):
        lost = min(keys.difference(rows["key"].to_pylist()))
        raise InputError(
            f"{kept}: key {lost!r} is not in {seen.folder}, or failed there; expected a selection of that data set"
        )
    return trained_on


def draw_subset(rows: pa.Table, limit: int, seed: int) -> Tensor:
    """At most ``limit`` row numbers, ascending: those whose keys come first in a seeded hash order."""
    if len(rows) <= limit:
        return torch.arange(len(rows))
    hashes = [hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest() for key in rows["key"].to_pylist()]
    return torch.tensor(sorted(sorted(range(len(rows)), key=hashes.__getitem__)[:limit]))


def left_out_rows(real: FeatureFolder, trained_on: np.ndarray, limit: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of the training images, at most ``limit``: their numbers among the training images, and features."""
    rows = np.flatnonzero(trained_on)
    chosen = draw_subset(real.rows.take(rows), limit, seed)
    return chosen.to(real.device), real.take(torch.from_numpy(rows)[chosen])


def labels_of(rows: pa.Table) -> Tensor:
    """Labels [N] int64, -1 where there is none."""
    return torch.from_numpy(pc.fill_null(rows["label"], -1).to_numpy().astype(np.int64))


def same_seed_rows(made: FeatureFolder, other: FeatureFolder) -> tuple[FeatureFolder, Tensor, Tensor]:
    """The other model's folder, and which rows of it and of ``made`` have the same key, in one order."""
    common_embedder(made, other)
    plans = [folder.metadata.get("sampled") for folder in (made, other)]
    for field in ("seed", "labels"):
        found = [plan.get(field) if isinstance(plan, dict) else None for plan in plans]
        if found[0] != found[1]:
            raise InputError(
                f"{other.folder}: drawn with another {field} than {made.folder}: {found[1]} and {found[0]}; only "
                f"images of the same noise and label can be compared one by one"
            )
    place = pc.index_in(made.rows["key"], value_set=other.rows["key"].combine_chunks())
    place = pc.fill_null(place, -1).to_numpy().astype(np.int64)
    both = np.flatnonzero(place >= 0)
    if len(both) < 2:
        raise InputError(f"{other.folder}: fewer than 2 of its keys are in {made.folder}; expected samples of one seed")
    return other, torch.from_numpy(both), torch.from_numpy(place[both])

"""Latents that are encoded from images when they are asked for: no latents folder, the same numbers."""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from diffprune.arrays import array_digest
from diffprune.decode import MAX_PIXELS, read_all_annotations
from diffprune.device import pick_device
from diffprune.encoding import vqvae_network, with_twins
from diffprune.errors import InputError
from diffprune.files import fingerprint
from diffprune.image_maps import ImageMap, Indexed, Reading
from diffprune.latent_scales import missing_latent_scale
from diffprune.memory import free_bytes
from diffprune.prefetch import Prefetch
from diffprune.progress import progress
from diffprune.rank_talk import environment_number
from diffprune.ranks import Ranks
from diffprune.shards import ShardIndex, ShardSpec, show_spec
from diffprune.storage import as_path
from diffprune.tables import BASE_SCHEMA_IN_MEMORY, base_table, kept_keys

_SHARDS_KEPT = 2  # in memory: the one that is scored and the one that is read ahead


class LiveLatents:
    """Shards and a VQ-VAE, with ``ArrayFolder``'s interface.

    ``metadata``, ``fingerprint``, ``stems``, ``load()``, ``table(stem)`` and ``array(stem)`` are those of the folder
    that ``encode`` would write with the same arguments, to the bit; so scores are the same, and a folder of scores
    begun with the one can be finished with the other. Every pass over the shards decodes and encodes again: with
    several passes (MoSo, several checkpoints) ``encode`` once is cheaper. The last two shards that were asked for are
    kept in memory. May be called by several threads, such as ``Prefetch``'s.

    Raises InputError as ``encode`` does: a missing or damaged shard, no VQ-VAE, a batch of nothing.
    """

    def __init__(
        self,
        shards: ShardSpec,
        vqvae: str | os.PathLike,
        *,
        batch_size: int = 256,
        device: str = "auto",
        strict_decode: bool = True,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        reading = Reading(strict_decode, max_pixels)
        scale = missing_latent_scale(vqvae, shards, pick_device(device), reading)
        self._about = vqvae, device, scale, batch_size, reading
        self.folder = show_spec(shards)  # for messages
        self._begin(shards)

    def _begin(self, shards: ShardSpec | None, indexed: Sequence[Indexed] | None = None) -> None:
        """Load the VQ-VAE and index ``shards``, or take what was ``indexed`` in another process."""
        self.vqvae, device, scale, batch_size, reading = self._about
        network = vqvae_network(self.vqvae, pick_device(device), scale)
        self._images = ImageMap(network, shards, batch_size, reading)
        if indexed is not None:
            self._images.take(indexed)
        self.metadata: dict[str, Any] = {**self._images.config, "model_path": network.path}
        self.fingerprint: str = fingerprint(self._images.config)
        self.stems: list[str] = list(self._images.indexes)
        self.samples: int = sum(len(index.samples) for index in self._images.indexes.values())
        self._digests: dict[str, str] = {}  # of arrays that were made
        self._kept: OrderedDict[str, tuple[pa.Table, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:  # for a worker, which loads the VQ-VAE itself
        return {"folder": self.folder, "_about": self._about, "indexed": [*map(self._images.indexed, self.stems)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.folder, self._about = state["folder"], state["_about"]
        self._begin(None, state["indexed"])

    def table(self, stem: str) -> pa.Table:
        """The base columns of one shard's samples; encodes it, as only then it is known which images fail."""
        return self._shard(stem)[0]

    def array(self, stem: str) -> np.ndarray:
        """float16 [n, C, H, W], row-aligned with ``table(stem)``, NaN where a sample failed."""
        return self._shard(stem)[1]

    def identity(self, stem: str) -> dict[str, Any]:
        """As ``ArrayFolder.identity``; of the array only once it was made."""
        known = {"array": self._digests[stem]} if stem in self._digests else {}
        return {**self._images.indexes[stem].identity, **known}

    def identities(self) -> dict[str, dict[str, Any]]:
        """As ``ArrayFolder.identities``."""
        return {stem: self.identity(stem) for stem in self.stems}

    def load(
        self, kept: str | os.PathLike | None = None, *, twins: bool = False, ranks: Ranks | None = None
    ) -> tuple[pa.Table, np.ndarray, np.ndarray | None]:
        """All rows that are ok, in memory, in shard order: (table, float16 [N, C, H, W], with ``twins`` their mirrors).

        The first two are those of ``ArrayFolder.load``. ``kept`` (a kept.parquet) restricts them to its keys, and what
        is read and encoded to these (other images share a batch then: rounding). Each of ``ranks`` encodes a share of
        the batches, and has all rows in the end, to the bit those of a single process. Raises InputError if a key of
        ``kept`` is not here or fails, if the processes see different data, or if the rows do not fit into memory.
        """
        ranks = ranks or Ranks()
        kept = None if kept is None else as_path(kept)
        images, wanted = copy(self._images), None if kept is None else kept_keys(kept)
        if wanted is not None:
            images.indexes = {stem: index.only(wanted) for stem, index in images.indexes.items()}
        if twins:
            images.network = with_twins(images.network)
            images.row_shape = (2, *images.row_shape)
        self._check_ranks(images, ranks)
        images.indexes = _share(images.indexes, images.batch_size, ranks)
        own, total = list(images.indexes), sum(len(index.samples) for index in images.indexes.values())
        tables, arrays = [BASE_SCHEMA_IN_MEMORY.empty_table()], []
        with Prefetch(images.batches, own) as batches, progress("encode", total=total, unit="images") as bar:
            for stem in own:
                table, array = images.run(stem, batches.parts(stem), bar)
                good = pc.equal(table["status"], "ok")
                tables.append(table.filter(good))
                arrays.append(array[good.to_numpy()])
        by_rank = ranks.gathered_objects(pa.concat_tables(tables))
        table = pa.concat_tables(by_rank)
        if wanted is not None and (found := set(table["key"].to_pylist())) != wanted:
            raise InputError(
                f"{kept}: {len(wanted - found)} of {len(wanted)} keys, {min(wanted - found)!r} first, are not in "
                f"{self.folder} or cannot be decoded there; is this a selection of another data set?"
            )
        values = np.empty((len(table), *images.row_shape), np.float16)
        ends = np.cumsum([0, *map(len, by_rank)])
        start = ends[ranks.rank]
        while arrays:  # let go of as they are copied
            array = arrays.pop(0)
            values[start : start + len(array)] = array
            start += len(array)
        for rank in range(ranks.size):
            ranks.tell(torch.from_numpy(values[ends[rank] : ends[rank + 1]]), rank)
        return table, values[:, 0] if twins else values, values[:, 1] if twins else None

    def _check_ranks(self, images: ImageMap, ranks: Ranks) -> None:
        """All encode the same samples in the same way, and each has room for all rows; before the work."""
        identities = {stem: index.identity for stem, index in images.indexes.items()}
        rows = sum(len(index.samples) for index in images.indexes.values())
        size = rows * math.prod(images.row_shape) * np.dtype(np.float16).itemsize
        local, free = environment_number("LOCAL_WORLD_SIZE", 1), free_bytes()
        seen = ranks.gathered_objects((fingerprint({"config": images.config, "shards": identities}), local, free))
        if len({about for about, _, _ in seen}) > 1:
            raise InputError(
                f"{self.folder}: the processes of this run see different samples there, or encode them otherwise; give "
                "all machines the same shards, kept.parquet and VQ-VAE"
            )
        local, free = min((there for _, *there in seen), key=lambda there: there[1] / there[0])
        if size * local > free:
            raise InputError(
                f"{self.folder}: expected memory for the latents of {rows:,} images, {size / 1e9:.1f} GB in each of "
                f"{local} processes of a machine, found {free / 1e9:.1f} GB free; `diffprune encode` them once and "
                "train on that folder, whose files are read by rows where memory is short"
            )

    def unread_table(self, stem: str) -> pa.Table:
        """As ``table``, but without a look at the images: labels are read, and a sample fails for its label only."""
        index = self._images.indexes[stem]
        return base_table(index.path.name, index.samples, *read_all_annotations(index))

    def _shard(self, stem: str) -> tuple[pa.Table, np.ndarray]:
        with self._lock:  # who asks for a shard that is being encoded waits for it
            if stem not in self._kept:
                self._kept[stem] = self._images.run(stem, self._images.batches(stem))
                self._digests[stem] = array_digest(self._kept[stem][1])
            self._kept.move_to_end(stem)
            while len(self._kept) > _SHARDS_KEPT:
                self._kept.popitem(last=False)
            return self._kept[stem]


def _share(indexes: Mapping[str, ShardIndex], batch_size: int, ranks: Ranks) -> dict[str, ShardIndex]:
    """What this process encodes: a run of whole batches, which hold the same images for any number of processes."""
    ends = np.cumsum([0, *(-(-len(index.samples) // batch_size) for index in indexes.values())])
    first, last = (int(ends[-1]) * rank // ranks.size for rank in (ranks.rank, ranks.rank + 1))
    shares = {}
    for (stem, index), start, end in zip(indexes.items(), ends[:-1], ends[1:], strict=True):
        rows = slice((max(first, start) - start) * batch_size, (min(last, end) - start) * batch_size)
        if rows.start < rows.stop:
            shares[stem] = index.only(frozenset(index.samples.keys[rows]))
    return shares

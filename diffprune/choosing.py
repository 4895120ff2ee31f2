"""The rows of a table that an order keeps. The arithmetic of the orders is in ``orders`` and ``diversity``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune import orders
from diffprune.errors import InputError
from diffprune.expressions import combine
from diffprune.progress import progress
from diffprune.requests import DIVERSE, Request

if TYPE_CHECKING:  # torch takes longer to import than a million rows to rank
    from torch import Tensor

_RANKED = {"highest": orders.highest, "lowest": orders.lowest, "middle": orders.middle}
_QUOTAS = {
    "proportional": orders.proportional_quotas,
    "balanced": orders.balanced_quotas,
    "equal": orders.equal_quotas,
}
_FEATURES = 512
_BANDWIDTH_ROWS = 1000
_DRAWN_AT_ONCE = 1 << 14  # random numbers: what they need stays in the cache, five times as fast


def choose(
    table: pa.Table,
    order: str,
    count: int | None = None,
    *,
    by: str | None = None,
    seed: int = 0,
    within: str = "nearest",
    per: str | None = None,
    shares: str = "proportional",
    quota: Mapping[str, int] | None = None,
    dedup: float | None = None,
    dedup_keep: str = "farthest",
    embeddings: np.ndarray | None = None,
    device: str = "auto",
) -> np.ndarray:
    """The rows of a table that an order keeps: [count] int64, ascending.

    The answer depends on keys and values, not on the order of rows: ties go to the smaller key, and random choices
    are drawn for (seed, key).

    Args:
        table: ``key``, ``status`` ("ok" or "failed"; failed rows are never chosen) and the columns that the order
            works on.
        order: of what ``by`` says: "highest", "lowest", "middle" (the contiguous middle of the ranking);
            "random" (the highest of the column ``random`` that ``score`` computes with this seed);
            with columns ``cluster`` and ``distance``, each cluster giving its share of ``count`` in proportion to its
            size (largest remainder): "cluster-nearest" to the centroid, "cluster-farthest", "cluster-middle",
            "cluster-random", "cluster-herding"; "balanced" (the same from each cluster, at most K times the smallest),
            "equal" (the same from each, what small clusters lack taken from the others), "drop-clusters" (whole
            clusters in random order, of the last one random samples);
            with ``embeddings``: "k-center" (farthest first, from a random sample on) and "herding" (kernel herding on
            512 random Fourier features of a Gaussian kernel as wide as the median distance).
        count: how many; None for as many as ``quota`` says, or, with ``dedup``, for all that are left, whatever the
            order.
        by: a score column, a sum of several columns' ranks, and perhaps groups inside which to rank: see ``parse_by``.
        within: how balanced and equal, and only these, choose inside a cluster: "nearest", "farthest", "middle",
            "random", "highest:<column>", "lowest:<column>", "herding" or "k-center".
        per: a column of whole numbers or text, such as "label": the order is applied to the samples of each of its
            values by themselves. ``by="grand & label"`` means ``by="grand", per="label"``.
        shares: how many each group of ``per`` gives: "proportional" to its size, or as "balanced" and "equal" do.
        quota: instead of ``count`` and ``shares``: how many of each group of ``per``, by name; "*" for all others.
        dedup: leave out near-duplicates first (SemDeDup): inside each cluster, samples whose cosine similarity to
            another one is above 1 - ``dedup``, except the one that ``dedup_keep`` says: the farthest from the centroid
            (the paper's choice), the nearest, or a random one.
        embeddings: [N, D] float16 or float32, row-aligned with the table (rows that failed may hold anything).
        device: where k-center, herding and dedup compute: "auto", "cpu", "cuda", "cuda:N".

    Raises:
        InputError: see ``select``.
    """
    request = Request(order, by, seed, within, per, shares, quota, dedup, dedup_keep)
    request.check(table, counted=count is not None)
    return choose_rows(table, request, count, embeddings, device)


def choose_rows(
    table: pa.Table, request: Request, count: int | None, embeddings: np.ndarray | None, device: str
) -> np.ndarray:
    """``choose``, of a request that was checked."""
    rows = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
    what = "the samples that did not fail"
    if not len(rows) >= 1:
        raise InputError("expected samples to choose from, found none that did not fail")
    keys = _of_rows(table["key"], rows)
    if not pc.all(pc.less_equal(keys[:-1], keys[1:])).as_py():
        rows = rows[pc.sort_indices(keys).to_numpy()]
    chooser = _Chooser(table, rows, request, embeddings, device)
    members = np.arange(len(rows))
    if request.dedup is not None:
        members = chooser.without_duplicates()
        what += f" and are no near-duplicates ({len(rows) - len(members)} are)"
    if count is None and request.quota is None:
        return np.sort(rows[members])
    if count is not None and not 1 <= count <= len(members):
        raise InputError(f"count: expected 1 to {len(members)} ({what}), got {count}")
    return np.sort(rows[chooser.choose(members, count)])


class _Chooser:
    """The orders over the candidate rows of one table, which are in key order. Results are positions among them."""

    def __init__(
        self, table: pa.Table, rows: np.ndarray, request: Request, embeddings: np.ndarray | None, device: str
    ) -> None:
        self.table, self.rows, self.request = table, rows, request
        self.embeddings, self.device = embeddings, device

    def choose(self, members: np.ndarray, count: int | None) -> np.ndarray:
        """Of ``members``, ascending positions, those that the order keeps, group by group of ``per``."""
        if self.request.group is None:
            return self.apply(members, count)
        names, group = self.groups(members)
        sizes = np.bincount(group)
        if self.request.quota is not None:
            quotas = orders.given_quotas(names, sizes, self.request.quota, self.request.group)
        else:
            quotas = _QUOTAS[self.request.shares](sizes, count)
        if self.request.order == "random":
            return members[orders.within_clusters(group, quotas, self.random[members], "highest")]
        if self.request.ranking is not None:
            return members[orders.within_clusters(group, quotas, self.score[members], self.request.order)]
        parts = np.split(members[np.argsort(group, kind="stable")], np.cumsum(sizes)[:-1])
        chosen = [self.apply(part, int(quota)) for part, quota in zip(parts, quotas, strict=True) if quota]
        return np.concatenate(chosen)

    def apply(self, members: np.ndarray, count: int) -> np.ndarray:
        """Of ``members`` the ``count`` that the order keeps."""
        order = self.request.order
        if self.request.ranking is not None:
            return members[_RANKED[order](self.score[members], count)]
        if order == "random":
            return members[orders.highest(self.random[members], count)]
        if order in DIVERSE:
            return self.diverse(order, [members], [count])
        names, cluster = orders.group_codes(self.cluster[members])
        sizes = np.bincount(cluster)
        if order == "drop-clusters":
            from diffprune.draws import uniform

            draws = uniform(self.request.seed, [str(name) for name in names.tolist()], "drop-clusters").numpy()
            ranking = np.argsort(-draws, kind="stable")
            return members[orders.whole_clusters(cluster, ranking, self.random[members], count)]
        if order in ("balanced", "equal"):
            quotas, within = _QUOTAS[order](sizes, count), self.request.within
        else:
            quotas, within = orders.proportional_quotas(sizes, count), order.removeprefix("cluster-")
        if within in DIVERSE:
            parts = np.split(members[np.argsort(cluster, kind="stable")], np.cumsum(sizes)[:-1])
            return self.diverse(within, parts, quotas.tolist())
        values, part = self.ranking(within)
        return members[orders.within_clusters(cluster, quotas, values[members], part)]

    def ranking(self, within: str) -> tuple[np.ndarray, str]:
        """The values to rank by inside clusters, and which end of them to keep."""
        if within == "random":
            return self.random, "highest"
        end, _, column = within.partition(":")
        if column:
            return self.column(column), end
        return self.distance, {"nearest": "lowest", "farthest": "highest", "middle": "middle"}[within]

    def without_duplicates(self) -> np.ndarray:
        """The positions that are left by ``dedup``."""
        from diffprune.diversity import near_duplicates

        keep = self.request.dedup_keep
        values = self.random if keep == "random" else self.distance if keep == "farthest" else -self.distance
        points = self.points("dedup")
        zero = np.flatnonzero((points.abs().amax(dim=1) == 0).cpu().numpy())
        if len(zero):
            key = self.table["key"][int(self.rows[zero[0]])].as_py()
            raise InputError(f"dedup: {len(zero)} embeddings have length 0, so no cosine similarity, first key {key!r}")
        _, cluster = orders.group_codes(self.cluster)
        with progress("dedup", total=len(values), unit="samples") as bar:
            return np.flatnonzero(~near_duplicates(points, cluster, values, self.request.dedup, bar.advance))

    def diverse(self, order: str, parts: list[np.ndarray], quotas: list[int]) -> np.ndarray:
        """k-center or herding inside each of the parts; herding with one kernel for all of them."""
        import torch

        from diffprune import diversity

        points = self.points(order)
        chosen = [np.empty(0, dtype=np.int64)]
        with progress(order, total=sum(quotas), unit="samples") as bar:
            for members, quota in zip(parts, quotas, strict=True):
                if quota == 0:
                    continue
                inside = points
                if len(members) < len(points):
                    inside = points[torch.from_numpy(members).to(points.device)]
                if order == "k-center":
                    first = int(np.argmax(self.random[members]))
                    chosen.append(members[diversity.k_center(inside, quota, first, bar.advance)])
                else:
                    features = diversity.fourier_features(inside, *self.kernel)
                    chosen.append(members[diversity.herding(features, quota, bar.advance)])
        return np.concatenate(chosen)

    @cached_property
    def kernel(self) -> tuple[Tensor, Tensor, float]:
        """Directions, phases and bandwidth of the random Fourier features."""
        from diffprune.diversity import median_distance
        from diffprune.draws import draw_noise, uniform

        points = self.points("herding")
        spread = median_distance(points, orders.highest(self.random, _BANDWIDTH_ROWS))
        names = [f"fourier-{feature}" for feature in range(_FEATURES)]
        directions = draw_noise(self.request.seed, names, 0, (points.shape[1],)).to(points.device)
        return directions, uniform(self.request.seed, names, "phase").to(points.device), spread

    @cached_property
    def random(self) -> np.ndarray:
        """A number in [0, 1) for (seed, key), [n] float64."""
        from diffprune.draws import hash_keys, uniform

        keys, draws = _of_rows(self.table["key"], self.rows), np.empty(len(self.rows))
        for start in range(0, len(keys), _DRAWN_AT_ONCE):
            hashes = hash_keys(keys.slice(start, _DRAWN_AT_ONCE).to_pylist())
            draws[start : start + _DRAWN_AT_ONCE] = uniform(self.request.seed, hashes, "random").numpy()
        return draws

    @cached_property
    def score(self) -> np.ndarray:
        """What ``by`` says, float64 [n]."""
        return combine(self.request.ranking, {name: self.column(name) for name in self.request.ranking.columns})

    @cached_property
    def cluster(self) -> np.ndarray:
        values = self.column("cluster")
        if (broken := values[(values != np.rint(values)) | np.isinf(values)]).size:
            raise InputError(f"column 'cluster': expected whole numbers, found {broken[0]:g}")
        return values.astype(np.int64)

    @cached_property
    def distance(self) -> np.ndarray:
        return self.column("distance")

    def groups(self, members: np.ndarray) -> tuple[list[Any], np.ndarray]:
        """The names of the groups of ``per``, ascending, and each member's group [len(members)]."""
        name = self.request.group
        values = self.table[name].take(pa.array(self.rows[members])).combine_chunks()
        if values.null_count:
            key = self.table["key"][int(self.rows[members[int(np.argmax(values.is_null().to_numpy(False)))]])].as_py()
            raise InputError(f"per {name!r}: {values.null_count} of {len(values)} samples have none, first key {key!r}")
        if pa.types.is_integer(values.type):
            numbers = values.to_numpy()
            if numbers.dtype != np.uint64 or int(numbers.max()) < 2**63:
                numbers = numbers.astype(np.int64)
            names, group = orders.group_codes(numbers)
            return names.tolist(), group
        encoded = values.dictionary_encode() if not pa.types.is_dictionary(values.type) else values
        texts = encoded.dictionary.to_pylist()
        ranks = np.empty(len(texts), dtype=np.int64)
        ranks[sorted(range(len(texts)), key=texts.__getitem__)] = np.arange(len(texts))
        return sorted(texts), ranks[encoded.indices.to_numpy()]

    def column(self, name: str) -> np.ndarray:
        """float64 [n], or, of whole numbers that it does not hold, their ranks; InputError if a value is missing."""
        found = _of_rows(self.table[name], self.rows)
        try:
            values = found.cast(pa.float64()).to_numpy()  # null -> NaN
        except pa.ArrowInvalid:
            ranks = pc.rank(found, tiebreaker="dense").to_numpy()
            values = np.where(found.is_null().to_numpy(), np.nan, ranks)
        bad = np.flatnonzero(np.isnan(values))
        if len(bad):
            key = self.table["key"][int(self.rows[bad[0]])].as_py()
            raise InputError(
                f"column {name!r}: {len(bad)} of {len(values)} samples that did not fail have no score (NaN or null), "
                f"first key {key!r}; score them again"
            )
        return values

    @cached_property
    def _points(self) -> Tensor:
        import torch

        from diffprune.device import pick_device

        shape = self.embeddings.shape
        if len(shape) != 2 or shape[0] != self.table.num_rows or shape[1] == 0:
            raise InputError(f"embeddings: expected [{self.table.num_rows}, D], one row each, got {shape}")
        values = self.embeddings[self.rows]
        if values.dtype not in (np.float16, np.float32):
            values = values.astype(np.float32)
        points = torch.from_numpy(values)
        finite = [_finite(tile) for tile in points.split(max(1, (1 << 22) // shape[1]))]
        bad = np.flatnonzero(~torch.cat(finite).numpy())
        if len(bad):
            key = self.table["key"][int(self.rows[bad[0]])].as_py()
            raise InputError(f"embeddings: {len(bad)} rows hold NaN or infinity, first key {key!r}; embed them again")
        return points.to(pick_device(self.device))

    def points(self, what: str) -> Tensor:
        """The candidates' embeddings, [n, D] float16 or float32."""
        if self.embeddings is None:
            raise InputError(f"{what} works on embeddings: give the folder that `diffprune embed` wrote")
        return self._points


def _of_rows(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """Those rows of a column: no copy of it where they are all, in order."""
    if len(rows) == len(column) and bool((rows[1:] > rows[:-1]).all()):
        return column
    return column.take(pa.array(rows))


def _finite(tile: Tensor) -> Tensor:
    low, high = tile.aminmax(dim=1)
    return low.isfinite() & high.isfinite()

"""The rows of a table that an order keeps. The arithmetic of the orders is in ``orders``."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffprune import orders
from diffprune.draws import draw_noise, uniform
from diffprune.errors import InputError
from diffprune.progress import progress
from diffprune.tables import score_columns

NEEDS = {  # what each order works on
    "highest": {"by"},
    "lowest": {"by"},
    "middle": {"by"},
    "random": set(),
    "cluster-nearest": {"cluster"},
    "cluster-farthest": {"cluster"},
    "cluster-middle": {"cluster"},
    "cluster-random": {"cluster"},
    "balanced": {"cluster", "within"},
    "equal": {"cluster", "within"},
    "drop-clusters": {"cluster"},
    "k-center": {"embeddings"},
    "herding": {"embeddings"},
}
ORDERS = tuple(NEEDS)
_FEATURES = 512
_BANDWIDTH_ROWS = 1000


def choose(
    table: pa.Table,
    order: str,
    count: int,
    *,
    by: str | None = None,
    seed: int = 0,
    within: str = "nearest",
    embeddings: np.ndarray | None = None,
) -> np.ndarray:
    """The rows of a table that an order keeps: [count] int64, ascending.

    The answer depends on keys and values, not on the order of rows: ties go to the smaller key, and random choices
    are drawn for (seed, key).

    Args:
        table: ``key``, ``status`` ("ok" or "failed"; failed rows are never chosen) and the columns that the order
            works on.
        order: of a score column ``by``: "highest", "lowest", "middle" (the contiguous middle of the ranking);
            "random" (the highest of the column ``random`` that ``score`` computes with this seed);
            with columns ``cluster`` and ``distance``, each cluster giving its share of ``count`` in proportion to its
            size (largest remainder): "cluster-nearest" to the centroid, "cluster-farthest", "cluster-middle",
            "cluster-random"; "balanced" (the same from each cluster, at most K times the smallest), "equal" (the same
            from each, what small clusters lack taken from the others), "drop-clusters" (whole clusters in random
            order, of the last one random samples);
            with ``embeddings``: "k-center" (farthest first, from a random sample on) and "herding" (kernel herding on
            512 random Fourier features of a Gaussian kernel as wide as the median distance).
        within: how balanced and equal, and only these, choose inside a cluster: "nearest", "farthest", "middle",
            "random", "highest:<column>", "lowest:<column>" or "herding".
        embeddings: [N, D] float32, row-aligned with the table (rows that failed may hold anything).

    Raises:
        InputError: see ``select``.
    """
    check_arguments(table, order, by, within, seed)
    rows = np.flatnonzero(pc.equal(table["status"], "ok").to_numpy())
    if not 1 <= count <= len(rows):
        raise InputError(f"count: expected 1 to {len(rows)} (the samples that did not fail), got {count}")
    rows = rows[pc.sort_indices(table["key"].take(pa.array(rows))).to_numpy()]
    return np.sort(rows[_Chooser(table, rows, seed, embeddings).choose(order, count, by, within)])


def check_arguments(table: pa.Table, order: str, by: str | None, within: str, seed: int) -> None:
    """Raise InputError if the order is unknown, or the table lacks a column that it needs."""
    if order not in NEEDS:
        raise InputError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if not 0 <= seed < 1 << 32:
        raise InputError(f"seed: expected 0 to 2**32 - 1, got {seed}")
    if "by" in NEEDS[order]:
        if by is None:
            raise InputError(f"order {order!r} ranks a score column: give `by`, one of {_columns_there(table)}")
        _check_column(table, by)
    elif by is not None:
        raise InputError(f"order {order!r} takes no score column, got by={by!r}; leave `by` out")
    if "cluster" not in NEEDS[order]:
        return
    part = order.removeprefix("cluster-")
    if "within" in NEEDS[order]:
        part = within
        end, _, column = within.partition(":")
        if column and end in ("highest", "lowest"):
            _check_column(table, column)
        elif within not in ("nearest", "farthest", "middle", "random", "herding"):
            raise InputError(
                "within: expected nearest, farthest, middle, random, herding, highest:<column> or lowest:<column>, "
                f"got {within!r}"
            )
    for name in ("cluster", *(["distance"] if part in ("nearest", "farthest", "middle") else [])):
        if name not in table.column_names:
            raise InputError(
                f"order {order!r} needs the column {name!r}, found {_columns_there(table)}: "
                "run `diffprune cluster` and pass its folder too"
            )


class _Chooser:
    """The orders over the candidate rows of one table, which are in key order."""

    def __init__(self, table: pa.Table, rows: np.ndarray, seed: int, embeddings: np.ndarray | None) -> None:
        self.table, self.rows, self.seed, self.embeddings = table, rows, seed, embeddings
        self.total = table.num_rows

    def choose(self, order: str, count: int, by: str | None, within: str) -> np.ndarray:
        """Positions in ``rows``."""
        if by is not None:
            return getattr(orders, order)(self.column(by), count)
        if order == "random":
            return orders.highest(self.random, count)
        if order == "k-center":
            points = self.points(order)
            with progress(order, total=count, unit="samples") as bar:
                return orders.k_center(points, count, int(np.argmax(self.random)), bar.advance)
        if order == "herding":
            return self.herd(np.zeros(len(self.rows), dtype=np.int64), np.array([count]))
        names, cluster = np.unique(self.column("cluster").astype(np.int64), return_inverse=True)
        sizes = np.bincount(cluster)
        if order == "drop-clusters":
            draws = uniform(self.seed, [str(name) for name in names], "drop-clusters").numpy()
            return orders.whole_clusters(cluster, np.argsort(-draws, kind="stable"), self.random, count)
        if order in ("balanced", "equal"):
            quotas = getattr(orders, f"{order}_quotas")(sizes, count)
        else:
            quotas, within = orders.proportional_quotas(sizes, count), order.removeprefix("cluster-")
        if within == "herding":
            return self.herd(cluster, quotas)
        return orders.within_clusters(cluster, quotas, *self.ranking(within))

    def ranking(self, within: str) -> tuple[np.ndarray, str]:
        """The values to rank by inside clusters, and which end of them to keep."""
        if within == "random":
            return self.random, "highest"
        end, _, column = within.partition(":")
        if column:
            return self.column(column), end
        return self.column("distance"), {"nearest": "lowest", "farthest": "highest", "middle": "middle"}[within]

    @cached_property
    def random(self) -> np.ndarray:
        """A number in [0, 1) for (seed, key), [n] float64."""
        return uniform(self.seed, self.table["key"].take(pa.array(self.rows)).to_pylist(), "random").numpy()

    def column(self, name: str) -> np.ndarray:
        """float64 [n]; InputError if a value is missing."""
        values = self.table[name].take(pa.array(self.rows)).cast(pa.float64()).to_numpy()  # null -> NaN
        bad = np.flatnonzero(np.isnan(values))
        if len(bad):
            key = self.table["key"][int(self.rows[bad[0]])].as_py()
            raise InputError(
                f"column {name!r}: {len(bad)} of {len(values)} samples that did not fail have no score (NaN or null), "
                f"first key {key!r}; score them again"
            )
        return values

    def points(self, order: str) -> np.ndarray:
        if self.embeddings is None:
            raise InputError(f"order {order!r} works on embeddings: give the folder that `diffprune embed` wrote")
        if self.embeddings.ndim != 2 or len(self.embeddings) != self.total:
            raise InputError(f"embeddings: expected [{self.total}, D], one row each, got {self.embeddings.shape}")
        points = self.embeddings[self.rows].astype(np.float32, copy=False)
        bad = np.flatnonzero(~np.isfinite(points).all(axis=1))
        if len(bad):
            key = self.table["key"][int(self.rows[bad[0]])].as_py()
            raise InputError(f"embeddings: {len(bad)} rows hold NaN or infinity, first key {key!r}; embed them again")
        return points

    def herd(self, cluster: np.ndarray, quotas: np.ndarray) -> np.ndarray:
        """Herding inside each cluster, with one kernel for all of them."""
        points = self.points("herding")
        spread = orders.median_distance(points, orders.highest(self.random, _BANDWIDTH_ROWS))
        names = [f"fourier-{feature}" for feature in range(_FEATURES)]
        directions = draw_noise(self.seed, names, 0, (points.shape[1],)).numpy()
        phases = uniform(self.seed, names, "phase").numpy()
        members = np.split(np.argsort(cluster, kind="stable"), np.cumsum(np.bincount(cluster))[:-1])
        chosen = []
        with progress("herding", total=int(quotas.sum()), unit="samples") as bar:
            for rows, quota in zip(members, quotas.tolist(), strict=True):
                features = orders.fourier_features(points[rows], directions, phases, spread)
                chosen.append(rows[orders.herding(features, quota, bar.advance)])
        return np.concatenate(chosen)


def _check_column(table: pa.Table, name: str) -> None:
    if name not in score_columns(table):
        raise InputError(f"no score column {name!r}; the tables have {_columns_there(table)}")
    kind = table.schema.field(name).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise InputError(f"column {name!r}: expected numbers to rank by, found {kind}")


def _columns_there(table: pa.Table) -> str:
    return ", ".join(score_columns(table)) or "no score column"

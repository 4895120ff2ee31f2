"""What may be asked of ``choose``: orders, groups, quotas, near-duplicates; checked against a table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from diffprune.errors import InputError
from diffprune.expressions import By, parse_by
from diffprune.files import read_json
from diffprune.storage import as_path
from diffprune.tables import BASE_COLUMNS, score_columns

NEEDS = {  # what each order works on
    "highest": {"by"},
    "lowest": {"by"},
    "middle": {"by"},
    "random": set(),
    "cluster-nearest": {"cluster"},
    "cluster-farthest": {"cluster"},
    "cluster-middle": {"cluster"},
    "cluster-random": {"cluster"},
    "cluster-herding": {"cluster"},
    "balanced": {"cluster", "within"},
    "equal": {"cluster", "within"},
    "drop-clusters": {"cluster"},
    "k-center": {"embeddings"},
    "herding": {"embeddings"},
}
ORDERS = tuple(NEEDS)
SHARES = ("proportional", "balanced", "equal")
DEDUP_KEEPS = ("farthest", "nearest", "random")
DIVERSE = ("herding", "k-center")
_BY_DISTANCE = ("nearest", "farthest", "middle")
_WITHIN = (*_BY_DISTANCE, "random", *DIVERSE)


@dataclass(frozen=True)
class Request:
    """The arguments of ``choose``, which says what they mean."""

    order: str
    by: str | None = None
    seed: int = 0
    within: str = "nearest"
    per: str | None = None
    shares: str = "proportional"
    quota: Mapping[str, int] | None = None
    dedup: float | None = None
    dedup_keep: str = "farthest"

    @cached_property
    def ranking(self) -> By | None:
        """``by``, parsed."""
        return None if self.by is None else parse_by(self.by)

    @property
    def group(self) -> str | None:
        """The column whose groups are chosen from one by one."""
        return self.per if self.per is not None else self.ranking.group if self.ranking else None

    @property
    def needs_embeddings(self) -> str | None:
        """What works on embeddings, if anything does."""
        if self.dedup is not None:
            return "dedup"
        if "within" in NEEDS[self.order] and self.within in DIVERSE:
            return f"within={self.within}"
        part = self.order.removeprefix("cluster-")
        return self.order if part in DIVERSE else None

    def columns(self) -> set[str]:
        """The columns that it works on, beside key and status."""
        names = {*(self.ranking.columns if self.ranking else ()), *([] if self.group is None else [self.group])}
        part = self.within if "within" in NEEDS[self.order] else self.order.removeprefix("cluster-")
        if "cluster" in NEEDS[self.order]:
            names |= {"cluster"} | ({"distance"} if part in _BY_DISTANCE else set())
            names |= {part.partition(":")[2]} - {""}
        if self.dedup is not None:
            names |= {"cluster"} | ({"distance"} if self.dedup_keep != "random" else set())
        return names

    def check(self, table: pa.Table, *, counted: bool) -> None:
        """Raise InputError if an argument is unknown, two do not go together, or the table lacks a column.

        ``counted``: whether so many are to be kept; else ``dedup`` alone may decide, and nothing is ranked then.
        """
        if self.order not in NEEDS:
            raise InputError(f"order: expected one of {', '.join(ORDERS)}, got {self.order!r}")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed: expected 0 to 2**32 - 1, got {self.seed}")
        self._check_by(table, counted or self.quota is not None or self.dedup is None)
        self._check_groups(table)
        if "within" in NEEDS[self.order]:
            _check_within(table, self.within)
        elif self.within != Request.within:
            raise InputError(
                f"within is for the orders balanced and equal; order {self.order!r} takes none, got {self.within!r}"
            )
        if self.dedup is None and self.dedup_keep != Request.dedup_keep:
            raise InputError(f"dedup_keep: got {self.dedup_keep!r}, but nothing is left out without dedup; give both")
        if self.dedup is not None:
            if not 0 < self.dedup < 2:
                raise InputError(
                    f"dedup: expected a cosine distance above 0 and below 2, such as 0.05, got {self.dedup}"
                )
            if self.dedup_keep not in DEDUP_KEEPS:
                raise InputError(f"dedup_keep: expected one of {', '.join(DEDUP_KEEPS)}, got {self.dedup_keep!r}")
        for name in sorted(self.columns() & {"cluster", "distance"}):
            if name not in table.column_names:
                raise InputError(
                    f"{f'order {self.order!r}' if self.dedup is None else 'dedup'} needs the column {name!r}, found "
                    f"{_columns_there(table)}: run `diffprune cluster` and pass its folder too (of arrays: a KMeans' "
                    "assignment_ and distance_)"
                )
            _check_column(table, name)

    def _check_by(self, table: pa.Table, ranked: bool) -> None:
        if "by" not in NEEDS[self.order]:
            if self.by is not None:
                raise InputError(
                    f"order {self.order!r} takes no score column, got by={self.by!r}; leave `by` out, or, for groups, "
                    "give `per`"
                )
            return
        if (ranking := self.ranking) is None:
            if not ranked:
                return
            raise InputError(f"order {self.order!r} ranks a score column: give `by`, one of {_columns_there(table)}")
        for column in ranking.columns:
            _check_column(table, column)

    def _check_groups(self, table: pa.Table) -> None:
        if self.ranking and self.ranking.group not in (None, self.group):
            raise InputError(f"by {self.by!r} groups by {self.ranking.group!r}, but per is {self.per!r}; give one")
        if self.shares not in SHARES:
            raise InputError(f"shares: expected one of {', '.join(SHARES)}, got {self.shares!r}")
        if self.quota is not None and self.shares != "proportional":
            raise InputError(f"expected quota or shares, got both (shares is {self.shares!r}); a quota says it all")
        if self.group is not None:
            _check_group(table, self.group)
        elif self.quota is not None or self.shares != "proportional":
            raise InputError("quota and shares are of groups: give `per`, such as label or cluster")


def read_quota(quota: str | os.PathLike | Mapping[str, int]) -> dict[str, int]:
    """A quota: a mapping, text such as "0=100,1=50,*=20", or the path of a JSON object; else InputError."""
    given: Any
    if isinstance(quota, Mapping):
        given, where = quota, "quota"
    elif isinstance(quota, str) and "=" in quota:
        pairs = [part.strip().rpartition("=") for part in quota.split(",") if part.strip()]
        names = [name.strip() for name, _, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"quota {quota!r}: group {twice[0]!r} stands in it twice")
        given, where = {n: _whole(v.strip()) for n, (_, _, v) in zip(names, pairs, strict=True)}, f"quota {quota!r}"
    else:
        given, where = read_json(quota, unique=True), f"{as_path(quota)}"
    if not isinstance(given, Mapping) or not given:
        raise InputError(f'{where}: expected numbers by group, such as 0=100,1=50 or {{"0": 100, "1": 50}}')
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InputError(f"{where}: group {name!r}: expected a number of samples, 0 or more, got {value!r}")
    return {str(name): value for name, value in given.items()}


def _whole(text: str) -> int | str:
    return int(text) if text.isascii() and text.isdigit() else text


def _check_within(table: pa.Table, within: str) -> None:
    end, _, column = within.partition(":")
    if column and end in ("highest", "lowest"):
        _check_column(table, column)
    elif within not in _WITHIN:
        raise InputError(f"within: expected {', '.join(_WITHIN)}, highest:<column> or lowest:<column>, got {within!r}")


def _check_column(table: pa.Table, name: str) -> None:
    if name not in score_columns(table):
        raise InputError(f"no score column {name!r}; the tables have {_columns_there(table)}")
    kind = table.schema.field(name).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise InputError(f"column {name!r}: expected numbers to rank by, found {kind}")


def _check_group(table: pa.Table, name: str) -> None:
    if name not in table.column_names:
        there = [column for column in table.column_names if column in ("label", "shard") or column not in BASE_COLUMNS]
        raise InputError(f"per: no column {name!r}; the tables have {', '.join(there)}")
    kind = table.schema.field(name).type
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind)
    if not (pa.types.is_integer(kind) or text):
        raise InputError(f"per {name!r}: expected a column of whole numbers or text to group by, found {kind}")


def _columns_there(table: pa.Table) -> str:
    return ", ".join(score_columns(table)) or "no score column"

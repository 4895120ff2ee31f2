"""The methods that a sweep can compare: each is one way of calling ``select``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from diffprune.config import section_from_table
from diffprune.errors import InputError
from diffprune.requests import DIVERSE, ORDERS, SHARES, Request

FULL = "full"
RANDOM = "random"
SCORES = ("loss", "el2n", "grand", "moso", "monotonicity")
"""The columns that a surrogate gives."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Method:
    """How to call ``select``; empty text is what ``select`` has by default."""

    order: str
    by: str = ""
    within: str = ""
    per: str = ""
    shares: str = ""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``select``."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}

    @property
    def columns(self) -> set[str]:
        """The columns of score tables that it works on."""
        return self._request.columns()

    @property
    def needs_embeddings(self) -> bool:
        """Whether ``select`` has to be given the embeddings."""
        return self._request.needs_embeddings is not None

    @property
    def _request(self) -> Request:
        return Request(**self.arguments())


def _known() -> dict[str, Method]:
    methods = {RANDOM: Method("random")}
    for score in SCORES:
        for name, order in (("high", "highest"), ("low", "lowest"), ("middle", "middle")):
            methods[f"{score}-{name}"] = Method(order, by=score)
    for part in ("nearest", "farthest", "middle", "random", "herding"):
        methods[f"cluster-{part}"] = Method(f"cluster-{part}")
    # `equal` and not `balanced`: where the smallest cluster can give its share the two are the same, and where it
    # cannot, `balanced` has no answer.
    for part in ("nearest", "farthest", "random", *DIVERSE):
        name = "cluster-balanced" if part == "nearest" else f"cluster-balanced-{part}"
        methods[name] = Method("equal", within=part)
    return methods | {name: Method(name) for name in ("drop-clusters", "k-center", "herding")}


METHODS: Mapping[str, Method] = _known()
"""Name -> method, beside those that a config defines."""


def own_methods(tables: Any, where: str) -> dict[str, Method]:
    """The tables ``[methods.NAME]`` of a config: keys order, by, within, per and shares of ``select``.

    Raises InputError, naming the key, for an unknown key or order, a name that is taken or that no folder can have, or
    a ``by`` that cannot be read or ranks a column that no stage of a sweep makes.
    """
    if not isinstance(tables, Mapping):
        raise InputError(f"{where}: methods: expected tables such as [methods.mine], found {tables!r}")
    methods = {}
    for name, table in tables.items():
        here = f"{where}: methods.{name}"
        if not _NAME.fullmatch(name):
            raise InputError(f"{here}: expected a name of small letters, digits, '-', '_' and '.'")
        if name in METHODS or name == FULL:
            raise InputError(f"{here}: there is a method of this name already")
        if not isinstance(table, Mapping) or "order" not in table:
            raise InputError(f"{here}: order is missing; expected one of {', '.join(ORDERS)}")
        method = section_from_table(Method, table, here)
        if method.order not in ORDERS:
            near = _near(method.order, ORDERS)
            raise InputError(f"{here}: order: expected one of {', '.join(ORDERS)}, got {method.order!r}{near}")
        if method.shares and method.shares not in SHARES:
            raise InputError(f"{here}: shares: expected one of {', '.join(SHARES)}, got {method.shares!r}")
        if method.order in ("highest", "lowest", "middle") and not method.by:
            raise InputError(f"{here}: by is missing: order {method.order!r} ranks a score column")
        try:
            columns = method.columns
        except InputError as error:
            raise InputError(f"{here}: {error}") from None
        there = {*SCORES, "cluster", "distance", "label", "shard"}
        if unknown := sorted(columns - there):
            raise InputError(f"{here}: no column {unknown[0]!r}; a sweep makes {', '.join(sorted(there))}")
        methods[name] = method
    return methods


def check_methods(names: Iterable[str], known: Mapping[str, Method], where: str) -> None:
    """Raise InputError that lists the known methods unless all are among them, and each named once."""
    seen: set[str] = set()
    for name in names:
        if name == FULL:
            raise InputError(f"{where}: {FULL!r} is no pruning method: its cells are there unless sweep.full is false")
        if name not in known:
            raise InputError(f"{where}: unknown method {name!r}{_near(name, known)}; known: {', '.join(known)}")
        if name in seen:
            raise InputError(f"{where}: method {name!r} stands in it twice")
        seen.add(name)


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""Numbers as people write them."""

from __future__ import annotations

import re

from diffprune.errors import InputError


def parse_bytes(size: int | str | None, name: str = "memory") -> int | None:
    """A number of bytes: 1000, "500MB", "2GiB"; for anything else InputError, which says the ``name`` of what it is."""
    if size is None or isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if not found:
        raise InputError(f"{name}: expected bytes such as 500MB or 2GiB, got {size!r}")
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))

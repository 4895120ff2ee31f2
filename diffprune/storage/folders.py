"""Local folders that go with what is remote."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diffprune.storage.paths import AnyPath


def cache_folder() -> Path:
    """What is kept between runs: ``DIFFPRUNE_CACHE``, or ``diffprune`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("DIFFPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffprune"


def spool_folder() -> str | None:
    """Where copies lie while they are needed: ``DIFFPRUNE_SPOOL``, or what ``TMPDIR`` and the system say (None)."""
    folder = os.environ.get("DIFFPRUNE_SPOOL") or None
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return folder


def partials_folder(out: AnyPath, fingerprint: str) -> Path:
    """Where a stage keeps what is no finished shard yet: in ``out``, or for a URL in the cache of this machine."""
    if isinstance(out, Path):
        return out / "_partials"
    return cache_folder() / "partials" / hashlib.sha256(f"{out}\n{fingerprint}".encode()).hexdigest()[:32]

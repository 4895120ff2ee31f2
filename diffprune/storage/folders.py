"""Local folders that go with what is remote."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from diffprune.errors import InputError
from diffprune.storage.paths import AnyPath, as_path


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
    if os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")):
        raise InputError(
            f"{out}: processes on several machines share what they keep between their passes, so they need a folder "
            f"that all of them see, not a URL; or let each machine do a --part"
        )
    return cache_folder() / "partials" / _hash(f"{out}\n{fingerprint}")


def lock_folder(out: str | os.PathLike) -> Path:
    """Where the locks of a folder are: in it, or for a URL in the cache of this machine."""
    path = as_path(out)
    return path if isinstance(path, Path) else cache_folder() / "locks" / _hash(str(path))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

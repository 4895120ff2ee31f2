"""Local folders that go with what is remote."""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TextIO

from diffprune.errors import InputError
from diffprune.storage.paths import AnyPath, as_path

_PREFIX = "diffprune-spool-"
_making = threading.Lock()


def cache_folder() -> Path:
    """What is kept between runs: ``DIFFPRUNE_CACHE``, or ``diffprune`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    given = os.environ.get("DIFFPRUNE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffprune"


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


def spool_folder() -> Path:
    """A folder for what this process needs while it runs: local copies, and files on their way to storage.

    It is made in ``DIFFPRUNE_SPOOL``, by default the system's folder for temporary files, and removed when the process
    ends; if it was killed, when the next one makes its own.
    """
    with _making:
        return _spool_folder(os.getpid()).path


def forget_spool_folder() -> None:
    """Make a new one from here on, where the environment says then."""
    _spool_folder.cache_clear()


class _Locked(NamedTuple):
    path: Path
    lock: TextIO  # held as long as the process lives


@lru_cache
def _spool_folder(process: int) -> _Locked:
    parent = Path(os.environ.get("DIFFPRUNE_SPOOL") or tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = open(folder / "lock.new", "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "lock.new", folder / "lock")

    def remove() -> None:
        if os.getpid() == process:  # not at the end of a fork
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return _Locked(folder, lock)


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of processes that were killed: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with open(folder / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use, or somebody else's
        shutil.rmtree(folder, ignore_errors=True)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

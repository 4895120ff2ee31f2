"""Local copies of objects that are read again and again, or by what reads local files only."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from diffprune.quantities import parse_bytes
from diffprune.storage.folders import spool_folder
from diffprune.storage.paths import AnyPath
from diffprune.storage.reading import BLOCK, ReadAhead, RemoteFile

_PREFIX = "diffprune-spool-"
_making = threading.Lock()


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """A local path to read a file by: its own, or that of a copy which is removed afterwards."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="diffprune-", dir=spool_folder()) as folder:
        local = Path(folder) / path.name
        with RemoteFile(path) as remote:
            _download(remote, local)
        yield local


def spooled(remote: RemoteFile) -> Path | None:
    """A local copy that lasts as long as the process, or None if there is no room left for it.

    The room is ``DIFFPRUNE_SPOOL_BYTES`` for each process, by default half of what the disk has free. First come, first
    kept: what is read in turns, over and over, gains nothing from copies that replace each other.
    """
    with _making:
        spool = _spool(os.getpid())
    return spool.copy(remote)


class _Spool:
    def __init__(self) -> None:
        parent = Path(spool_folder() or tempfile.gettempdir())
        _remove_abandoned(parent)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock_file = open(self.folder / "lock.new", "w")  # noqa: SIM115 - locked until the process ends
        fcntl.flock(self._lock_file, fcntl.LOCK_EX)
        os.rename(self.folder / "lock.new", self.folder / "lock")
        self.room = _room(parent)
        self._copies: dict[tuple[str, str], Path] = {}
        self._lock = threading.Lock()

    def copy(self, remote: RemoteFile) -> Path | None:
        name = (os.fspath(remote.path), remote.version)
        with self._lock:
            if name in self._copies:
                return self._copies[name]
            if remote.size > self.room:
                return None
            local = self.folder / f"{len(self._copies)}{remote.path.suffix}"
            self.room -= remote.size
            _download(remote, local)
            self._copies[name] = local
            return local


@lru_cache
def _spool(process: int) -> _Spool:
    import atexit

    made = _Spool()
    atexit.register(lambda: os.getpid() == process and shutil.rmtree(made.folder, ignore_errors=True))
    return made


def _remove_abandoned(parent: Path) -> None:
    """Remove the copies of processes that were killed: nobody holds their lock."""
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            with open(folder / "lock") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # in use, or somebody else's
        shutil.rmtree(folder, ignore_errors=True)


def _room(folder: Path) -> int:
    given = parse_bytes(os.environ.get("DIFFPRUNE_SPOOL_BYTES"), "DIFFPRUNE_SPOOL_BYTES")
    return shutil.disk_usage(folder).free // 2 if given is None else given


def _download(remote: RemoteFile, local: Path) -> None:
    with open(local, "wb", buffering=0) as file, ReadAhead(remote, [(0, remote.size)]) as ahead:
        for at in range(0, remote.size, BLOCK):
            data = ahead.read_at(at, BLOCK)
            if file.write(data) != len(data):
                raise OSError(f"{local}: could not be written")

"""Local copies of objects that are read again and again, or by what reads local files only."""

from __future__ import annotations

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


@contextmanager
def local_file(path: AnyPath) -> Iterator[Path]:
    """A local path to read a file by: its own, or that of a copy which is removed afterwards."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(dir=spool_folder()) as folder:
        local = Path(folder) / path.name
        with RemoteFile(path) as remote:
            _download(remote, local)
        yield local


@contextmanager
def kept_file(path: AnyPath) -> Iterator[Path]:
    """As ``local_file``, for what may be read again: the copy stays as long as the process, if there is room for it."""
    local = path
    if not isinstance(path, Path):
        with RemoteFile(path) as remote:
            local = spooled(remote) or path
    with local_file(local) as found:
        yield found


def spooled(remote: RemoteFile) -> Path | None:
    """A local copy that lasts as long as the process, or None if there is no room left for it.

    The room is ``DIFFPRUNE_SPOOL_BYTES`` for each process, by default half of what the disk has free. First come, first
    kept: what is read in turns, over and over, gains nothing from copies that replace each other.
    """
    return _copies(spool_folder()).copy(remote)


class _Copies:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        given = parse_bytes(os.environ.get("DIFFPRUNE_SPOOL_BYTES"), "DIFFPRUNE_SPOOL_BYTES")
        self._room = shutil.disk_usage(folder).free // 2 if given is None else given
        self._made: dict[tuple[str, str], Path] = {}
        self._lock = threading.Lock()

    def copy(self, remote: RemoteFile) -> Path | None:
        name = (os.fspath(remote.path), remote.version)
        with self._lock:
            if name not in self._made:
                if remote.size > self._room:
                    return None
                local = self._folder / f"{len(self._made)}{remote.path.suffix}"
                _download(remote, local)
                self._room -= remote.size
                self._made[name] = local
            return self._made[name]


_making = threading.Lock()
_made = lru_cache(_Copies)


def _copies(folder: Path) -> _Copies:
    with _making:
        return _made(folder)


def _download(remote: RemoteFile, local: Path) -> None:
    with open(local, "wb", buffering=0) as file, ReadAhead(remote, [(0, remote.size)]) as ahead:
        for at in range(0, remote.size, BLOCK):
            data = ahead.read_at(at, BLOCK)
            if file.write(data) != len(data):
                raise OSError(f"{local}: could not be written")

"""``.npy`` files behind URLs."""

from __future__ import annotations

import io
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np

from diffprune.row_files import RowFile, runs
from diffprune.storage.paths import RemotePath
from diffprune.storage.reading import ReadAhead, RemoteFile
from diffprune.storage.spool import spooled

_HEADER_BYTES = 64 << 10


class RemoteArray:
    """An array [n, ...] of which the rows that are asked for are read.

    From a local copy, made when the first rows are asked for or, with ``copy``, at once, where the spool has room for
    it; else by ranges of the object. Raises ValueError, as ``np.load`` does, for what is no ``.npy`` or holds Python
    objects.
    """

    def __init__(self, path: RemotePath, *, copy: bool = False) -> None:
        self._file = RemoteFile(path)
        head = io.BytesIO(self._head(spooled(self._file) if copy else None))
        version = np.lib.format.read_magic(head)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"an .npy of version {version}")
        self.shape, in_fortran_order, self.dtype = read(head)
        if in_fortran_order or self.dtype.hasobject or not self.shape:
            raise ValueError(f"expected rows of numbers in C order, found {self.shape} {self.dtype}")
        self._begin = head.tell()
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        if self._file.size != self._begin + self._row_bytes * len(self):
            raise ValueError(
                f"{self._file.size:,} bytes; its header says {self._begin + self._row_bytes * len(self):,}"
            )
        self._local: RowFile | None = None  # of the local copy
        self._looked = False
        self._lock = threading.Lock()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """A run of rows, or rows by number or mask, in memory."""
        if (local := self._copy()) is not None:
            return local[rows]
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            size = max(0, stop - start)
            return self._rows(self._file.read_at(self._at(start), size * self._row_bytes), size)
        rows = np.flatnonzero(rows) if rows.dtype == bool else np.where(rows < 0, rows + len(self), rows)
        ranges = [(self._at(start), self._at(stop)) for start, stop in runs(rows)]
        with ReadAhead(self._file, ranges) as ahead:
            pieces = [ahead.read_at(start, stop - start) for start, stop in ranges]
        return self._rows(b"".join(pieces), len(rows))

    def whole(self) -> np.ndarray:
        """All of it: the local copy, memory-mapped, or in memory."""
        local = spooled(self._file)
        return self[:] if local is None else np.load(local, mmap_mode="r", allow_pickle=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)

    def _rows(self, data: bytes, count: int) -> np.ndarray:
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _at(self, row: int) -> int:
        return self._begin + row * self._row_bytes

    def _head(self, local: Path | None) -> bytes:
        if local is None:
            return self._file.read_at(0, _HEADER_BYTES)
        with open(local, "rb") as file:
            return file.read(_HEADER_BYTES)

    def _copy(self) -> RowFile | None:
        with self._lock:
            if not self._looked:
                path = spooled(self._file)
                self._local = None if path is None else RowFile(path)
                self._looked = True
            return self._local

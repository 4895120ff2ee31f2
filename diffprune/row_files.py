"""Rows of a ``.npy`` file that is open only while they are read."""

from __future__ import annotations

import os
from datetime import datetime
from io import FileIO

import numpy as np

from diffprune.errors import InputError


class RowFile:
    """An array [n, ...] in a ``.npy`` file on local disk, of which the rows that are asked for are read.

    A memory-mapped array holds its file open for as long as it lives, and by default a process may have 1,024 files
    open: fewer than a large data set has shards. Raises ValueError, as ``np.load`` does, for what is no ``.npy`` or
    holds Python objects.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.filename = os.fspath(path)
        self._version = _version(os.stat(self.filename))
        mapped = self._mapped()
        self.shape, self.dtype, self._offset = mapped.shape, mapped.dtype, mapped.offset
        self._in_order = mapped.flags["C_CONTIGUOUS"]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """A run of rows, or rows by number or mask, in memory."""
        return np.array(self._mapped()[rows])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number [m], ascending, in memory; neighbours in one read, and no mapped page stays for it.

        Raises InputError where the file is gone, or was changed since this was made.
        """
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        try:
            with open(self.filename, "rb", buffering=0) as file:
                if (now := _version(os.fstat(file.fileno()))) != self._version:
                    was, is_now = map(_told, (self._version, now))
                    raise InputError(
                        f"{self.filename}: was changed while it was in use: expected {was}, found {is_now}; run again, "
                        "on files that nothing writes to"
                    )
                if not self._in_order:
                    return np.array(self._mapped()[rows])
                done = 0
                for start, stop in runs(rows):
                    _fill(found[done : done + stop - start], file, self._offset, start)
                    done += stop - start
        except OSError as error:
            raise InputError(
                f"{self.filename}: cannot be read any more ({error.strerror}); it was there before: put it back, and "
                "run again"
            ) from error
        return found

    def read_into(self, target: np.ndarray, start: int) -> None:
        """Copy the rows from ``start`` on into ``target`` [m, ...]."""
        if self._in_order:
            read_rows(self.filename, self._offset, self.dtype, target, start)
        else:
            target[:] = self._mapped()[start : start + len(target)]

    def _mapped(self) -> np.memmap:
        return np.lib.format.open_memmap(self.filename, mode="r")


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Row numbers [m] as runs of neighbours, in order: the first, and the one after the last."""
    if not len(rows):
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, cuts)]


def read_rows(path: str | os.PathLike, offset: int, dtype: np.dtype, target: np.ndarray, start: int) -> None:
    """Rows of a file in C order, from ``start`` on, into ``target`` [m, ...]; no mapped page stays in memory for it."""
    alike = target.dtype == dtype and target.flags["C_CONTIGUOUS"]
    block = target if alike else np.empty(target.shape, dtype)
    with open(path, "rb", buffering=0) as file:
        _fill(block, file, offset, start)
    if not alike:
        target[:] = block


def _fill(block: np.ndarray, file: FileIO, offset: int, start: int) -> None:
    """``block`` [m, ...], in C order, with an open file's rows from ``start`` on."""
    file.seek(offset + start * block[:1].nbytes)
    view, done = memoryview(block).cast("B"), 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise InputError(f"{file.name}: ends before row {start + len(block)}; was it changed while being read?")
        done += count


def _version(found: os.stat_result) -> tuple[int, int]:
    """What tells a file's content from what it was before, as far as the system says."""
    return found.st_size, found.st_mtime_ns


def _told(version: tuple[int, int]) -> str:
    return f"{version[0]:,} bytes of {datetime.fromtimestamp(version[1] / 1e9)}"

"""Rows of a ``.npy`` file that is open only while they are read."""

from __future__ import annotations

import os

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

    def read_into(self, target: np.ndarray, start: int) -> None:
        """Copy the rows from ``start`` on into ``target`` [m, ...]."""
        if self._in_order:
            read_rows(self.filename, self._offset, self.dtype, target, start)
        else:
            target[:] = self._mapped()[start : start + len(target)]

    def _mapped(self) -> np.memmap:
        return np.lib.format.open_memmap(self.filename, mode="r")


def read_rows(path: str | os.PathLike, offset: int, dtype: np.dtype, target: np.ndarray, start: int) -> None:
    """Rows of a file in C order, from ``start`` on, into ``target`` [m, ...]; no mapped page stays in memory for it."""
    alike = target.dtype == dtype and target.flags["C_CONTIGUOUS"]
    block = target if alike else np.empty(target.shape, dtype)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset + start * block[:1].nbytes)
        view, done = memoryview(block).cast("B"), 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{path}: ends before row {start + len(target)}; was it changed while being read?")
            done += count
    if not alike:
        target[:] = block

"""Byte ranges from one file to the end of another, inside the kernel where it can."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, BinaryIO, Union

from diffprune.errors import InputError
from diffprune.shards import ShardReader
from diffprune.storage import AnyPath, RemotePath

if TYPE_CHECKING:
    from diffprune.storage.writing import Writer

Target = Union[int, "Writer"]  # a file descriptor, an upload, or a Comparison

_COPY_BYTES = 4 << 20
_FLUSHED_BYTES = 2 << 20
# What a kernel or file system that cannot do it answers: then the next way is tried.
_UNABLE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}


def copy_ranges(source: AnyPath, ranges: Iterable[tuple[int, int]], target: Target) -> None:
    """Append the bytes [begin, end) of each range of ``source`` to ``target``.

    Between two local files by ``copy_file_range``, which some file systems do without moving a byte, else ``sendfile``,
    else through memory; from or to a URL through memory. Raises InputError if ``source`` ends before a range does.
    """
    if isinstance(source, RemotePath) or not isinstance(target, int):
        _copy_through_memory(source, list(ranges), target)
        return
    ways = [way for name, way in _WAYS.items() if name == "read" or hasattr(os, name)]
    flushed, new = os.lseek(target, 0, os.SEEK_CUR), 0
    with open(source, "rb", buffering=0) as file:
        for begin, end in ranges:
            while begin < end:
                try:
                    copied = ways[0](file.fileno(), target, begin, end - begin)
                except OSError as error:
                    if len(ways) == 1 or error.errno not in _UNABLE:
                        raise
                    copied = 0
                begin, new = begin + copied, new + copied
                if new >= _FLUSHED_BYTES:
                    _begin_to_flush(target, flushed, new)
                    flushed, new = flushed + new, 0
                if copied == 0:
                    if os.fstat(file.fileno()).st_size < end:
                        raise InputError(
                            f"{source}: expected bytes up to {end}, found its end at "
                            f"{os.fstat(file.fileno()).st_size}: it was changed"
                        )
                    if len(ways) == 1:
                        raise OSError(errno.EIO, f"{source}: no byte could be read at {begin}")
                    ways = ways[1:]
    _begin_to_flush(target, flushed, new)


def write_all(target: Target, data: bytes) -> None:
    """Append ``data`` to ``target``, all of it."""
    if not isinstance(target, int):
        target.write(data)
        return
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


class Comparison:
    """A target that writes nothing: it finds the first byte at which a file differs from what would be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.position = file, 0
        self.difference: int | None = None

    def write(self, data: bytes) -> int:
        there = self._file.read(len(data)) if self.difference is None else b""
        if self.difference is None and there != data:
            same = zip(there, data, strict=False)
            place = next((at for at, (one, other) in enumerate(same) if one != other), len(there))
            self.difference = self.position + place
        self.position += len(data)
        return len(data)

    def end(self) -> int | None:
        """The first byte that differs, or that is too many; None if there is none."""
        if self.difference is None and self._file.read(1):
            return self.position
        return self.difference


def _copy_through_memory(source: AnyPath, ranges: list[tuple[int, int]], target: Target) -> None:
    with ShardReader(source) as reader:
        reader.will_read(ranges)
        for begin, end in ranges:
            for at in range(begin, end, _COPY_BYTES):
                write_all(target, reader.span(at, min(_COPY_BYTES, end - at)))


def _begin_to_flush(target: int, begin: int, size: int) -> None:
    """Have the disk write while the rest is copied, or it idles until the fsync. Only Linux can, and need not."""
    if size and (flush := _sync_file_range()) is not None:
        flush(target, begin, size, _WRITE)


_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and do not wait


@lru_cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _copy_file_range(source: int, target: int, begin: int, size: int) -> int:
    return os.copy_file_range(source, target, size, begin)


def _sendfile(source: int, target: int, begin: int, size: int) -> int:
    return os.sendfile(target, source, begin, size)


def _read(source: int, target: int, begin: int, size: int) -> int:
    data = os.pread(source, min(size, _COPY_BYTES), begin)
    write_all(target, data)
    return len(data)


_WAYS = {"copy_file_range": _copy_file_range, "sendfile": _sendfile, "read": _read}

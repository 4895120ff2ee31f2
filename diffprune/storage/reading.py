"""Objects read by ranges: ahead of who asks where the ranges are known, and by a rule where a walk decides them.

What a request costs beside its bytes is waiting: some 30 ms, in which one connection would bring two or three
megabytes. So what lies between two wanted ranges is read too where it is shorter than ``GAP``, with several requests
under way, or ``SKIP``, where each request waits for the one before it.
"""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, BinaryIO

from diffprune.errors import RemoteError
from diffprune.storage.clients import client_of
from diffprune.storage.paths import RemotePath, Stat

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 8 << 20  # bytes of a request where all of a file is wanted
GAP = 256 << 10
SKIP = 1 << 20
AHEAD = 4  # blocks under way before they are asked for
HELD = 16  # blocks in memory of one file at most: 128 MiB

WINDOWS = (256 << 10, 16 << 10, SKIP)  # what `index_tar` reads at a time: near headers, far ones, and what "far" is


class RemoteFile:
    """An object as it is now, or as it was indexed. A context manager; any thread may read.

    ``size``, ``version``: what they were when it was indexed, if it was: raises RemoteError if they are others now, by
    the time that a range is read (S3), or by the time that it is closed (others).
    """

    def __init__(self, path: RemotePath, size: int | None = None, version: str | None = None) -> None:
        self.path = path
        self._client = client_of(path)
        self._read = False
        if size is not None and version and self._client.ties_reads:  # the first read finds out
            self.size, self.version = size, version
            return
        found = path.stat()
        self.size, self.version = found.st_size if size is None else size, version or found.version
        if found != (self.size, self.version):
            raise self._changed(found)

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._read and not self._client.ties_reads:
            found = self.path.stat()
            if found != (self.size, self.version):
                raise self._changed(found)

    def read_at(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``, fewer at the end of the object; more than a block by several requests."""
        size = max(0, min(size, self.size - offset))
        if size <= BLOCK:
            return self.fetch(offset, size)
        with ReadAhead(self, [(offset, offset + size)]) as ahead:
            return b"".join(
                ahead.read_at(at, min(BLOCK, offset + size - at)) for at in range(offset, offset + size, BLOCK)
            )

    def fetch(self, offset: int, size: int) -> bytes:
        """One request."""
        self._read = True
        try:
            return self._client.get(self.path, offset, size, self.version)
        except FileNotFoundError as error:
            raise RemoteError(
                f"{self.path}: it was removed after it was indexed; what is finished is kept", "changed"
            ) from error
        except RemoteError as error:
            if error.kind == "changed" and (found := self.path.stat()) != (self.size, self.version):
                raise self._changed(found) from error
            raise

    def _changed(self, found: Stat) -> RemoteError:
        names = (("bytes", f"{self.size:,}", f"{found.st_size:,}"), ("version", self.version, found.version))
        told = " and ".join(f"{name} {was}, found {now or 'none'}" for name, was, now in names if was != now)
        return RemoteError(
            f"{self.path}: expected {told}: it changed after it was indexed; run the command again; what is finished "
            f"is kept",
            "changed",
        )


class ReadAhead:
    """The given ranges of a file, read before they are asked for, about in their order. A context manager.

    Ranges with less than ``GAP`` between them are read as one, in blocks of at most ``BLOCK`` bytes. What is asked for
    beside them is read for itself.
    """

    def __init__(self, file: RemoteFile, ranges: Iterable[tuple[int, int]], ahead: int = AHEAD) -> None:
        self._file = file
        self._blocks = plan_blocks(ranges)
        self._starts = [start for start, _ in self._blocks]
        self._ahead = ahead
        self._held: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(ahead, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._held.clear()

    def read_at(self, offset: int, size: int) -> bytes:
        """As ``RemoteFile.read_at``."""
        size = max(0, min(size, self._file.size - offset))
        number = bisect_right(self._starts, offset) - 1
        pieces, at = [], offset
        while at < offset + size:
            start, stop = self._blocks[number] if 0 <= number < len(self._blocks) else (0, 0)
            if size > BLOCK or not start <= at < stop:
                return self._file.read_at(offset, size)
            data = self._block(number)
            pieces.append(data[at - start : offset + size - start])
            at += len(pieces[-1])
            number += 1
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _block(self, number: int) -> bytes:
        with self._lock:
            for one in range(number, min(number + self._ahead + 1, len(self._blocks))):
                if one not in self._held and (one == number or one > max(self._held, default=-1)):
                    start, stop = self._blocks[one]
                    self._held[one] = self._pool.submit(self._file.fetch, start, stop - start)
            wanted = self._held[number]
            while len(self._held) > HELD:
                self._held.pop(min(self._held))
        return wanted.result()


def plan_blocks(ranges: Iterable[tuple[int, int]], gap: int = GAP, block: int = BLOCK) -> list[tuple[int, int]]:
    """[begin, end) of the requests that bring these ranges: close ones joined, long ones cut."""
    joined: list[list[int]] = []
    for start, stop in sorted(ranges):
        if start == stop:
            continue
        if joined and start - joined[-1][1] < gap:
            joined[-1][1] = max(joined[-1][1], stop)
        else:
            joined.append([start, stop])
    return [(at, min(at + block, stop)) for start, stop in joined for at in range(start, stop, block)]


class HeaderReads:
    """What the walk from header to header asks for (``index_tar`` with ``WINDOWS``). A context manager.

    The rule: where the next header lies further than ``SKIP`` on, the data before it are skipped, at the price of a
    request that the walk waits for; where it is closer they are read, in blocks that grow up to ``BLOCK`` and are then
    read ahead. So a tar of 100 kB images is read once from front to back, and one of 5 MB images by its headers only.
    """

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._start, self._data, self._size = 0, b"", WINDOWS[0]
        self._coming: deque[tuple[int, Future[bytes]]] = deque()  # where it begins, and the block
        self._pool = ThreadPoolExecutor(AHEAD, thread_name_prefix="index")

    def __enter__(self) -> HeaderReads:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read_at(self, offset: int, size: int) -> bytes:
        """As ``RemoteFile.read_at``."""
        end = min(offset + size, self._file.size)
        if not self._start <= offset <= end <= self._stop:
            if size <= WINDOWS[1]:
                return self._file.read_at(offset, size)
            if not self._start <= offset <= self._stop + SKIP:
                self._start, self._data, self._size = offset, b"", WINDOWS[0]
                self._coming.clear()
            while self._stop < end:
                kept = self._data[offset - self._start :]
                block = self._next_block()
                self._start = self._stop - len(kept)
                self._data = kept + block
        return self._data[offset - self._start : end - self._start]

    @property
    def _stop(self) -> int:
        return self._start + len(self._data)

    def _next_block(self) -> bytes:
        begin = self._stop
        if self._coming and self._coming[0][0] == begin:
            block = self._coming.popleft()[1].result()
        else:
            self._coming.clear()
            block = self._file.read_at(begin, self._size)
            self._size = min(2 * self._size, BLOCK)
        if self._size == BLOCK:
            last = self._coming[-1][0] + BLOCK if self._coming else begin + len(block)
            for at in range(last, self._file.size, BLOCK)[: AHEAD - len(self._coming)]:
                self._coming.append((at, self._pool.submit(self._file.read_at, at, BLOCK)))
        return block


class _Stream(io.RawIOBase):
    """A remote file as Python and pyarrow know files."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size)[whence]
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer).cast("B")
        data = self._file.read_at(self._at, len(target))
        target[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_remote(path: RemotePath) -> BinaryIO:
    """An object as a file, see ``as_stream``."""
    file, data = _begun(path)
    return io.BytesIO(data) if file is None else as_stream(file)


def read_whole(path: RemotePath) -> bytes:
    """All of an object."""
    file, data = _begun(path)
    return data if file is None else file.read_at(0, file.size)


def _begun(path: RemotePath) -> tuple[RemoteFile | None, bytes]:
    """A small object's bytes, or a larger one to be read; on S3 one request tells which of both it is."""
    client = client_of(path)
    if not client.ties_reads:
        return RemoteFile(path), b""
    data, about = client.first(path, SKIP)
    return (None, data) if len(data) == about.st_size else (RemoteFile(path, *about), b"")


def as_stream(file: RemoteFile) -> BinaryIO:
    """As Python's files: whole in memory if it is no larger than a block, else read by ranges of 1 MiB and more."""
    if file.size <= BLOCK:
        return io.BytesIO(file.read_at(0, file.size))
    return io.BufferedReader(_Stream(file), SKIP)

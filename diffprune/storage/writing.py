"""Objects written whole or not at all."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from diffprune.errors import DiffpruneError, RemoteError
from diffprune.storage.clients import client_of, refuse_writing
from diffprune.storage.folders import spool_folder
from diffprune.storage.paths import RemotePath
from diffprune.storage.s3 import S3Client

PART = 16 << 20  # bytes; S3 takes 10,000 parts, so it is doubled after every 2,000
_LARGER_AFTER = 2000
_UNDER_WAY = 3


class Writer(Protocol):
    """What ``writing`` yields."""

    def write(self, data: bytes) -> int: ...


@contextmanager
def writing(path: RemotePath) -> Iterator[Writer]:
    """Yield a writer; what it was given becomes the object if the block ends without an exception.

    On S3 an object larger than ``PART`` is uploaded in parts while it is written, and an upload that fails is removed;
    elsewhere it is collected in a local file first.
    """
    refuse_writing(path)
    client = client_of(path)
    if isinstance(client, S3Client):
        with _Upload(client, path) as upload:
            yield upload
        return
    with tempfile.NamedTemporaryFile(dir=spool_folder()) as file:
        yield file
        file.flush()
        client.put(path, Path(file.name))


@contextmanager
def writing_file(path: RemotePath) -> Iterator[Path]:
    """As ``writing``, for what can only write to a local path: yield one, in a temporary folder."""
    refuse_writing(path)
    with tempfile.TemporaryDirectory(dir=spool_folder()) as folder:
        local = Path(folder) / path.name
        yield local
        _send(local, path)


@contextmanager
def writing_folder(path: RemotePath, last: str | None) -> Iterator[Path]:
    """Yield a temporary folder, whose files become objects; the one called ``last`` goes first and comes last."""
    refuse_writing(path)
    with tempfile.TemporaryDirectory(dir=spool_folder()) as folder:
        yield Path(folder)
        if last:
            (path / last).unlink(missing_ok=True)
        for local in sorted(Path(folder).iterdir(), key=lambda local: (local.name == last, local.name)):
            _send(local, path / local.name)


def _send(local: Path, path: RemotePath) -> None:
    client = client_of(path)
    if not isinstance(client, S3Client):
        client.put(path, local)
        return
    with open(local, "rb") as file, _Upload(client, path) as upload:
        while data := file.read(4 << 20):
            upload.write(data)


class _Upload:
    """Parts go up as they fill, some at a time; the object appears when the last is there."""

    def __init__(self, client: S3Client, path: RemotePath) -> None:
        self._client, self._path = client, path
        self._buffer, self._size, self._number = bytearray(), 0, 0
        self._id: str | None = None
        self._parts: deque[Future[dict[str, Any]]] = deque()
        self._done: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(_UNDER_WAY, thread_name_prefix="upload")

    def __enter__(self) -> _Upload:
        return self

    def write(self, data: bytes) -> int:
        self._buffer += data
        self._size += len(data)
        while len(self._buffer) >= (part := PART << (self._number // _LARGER_AFTER)):
            self._send(bytes(self._buffer[:part]))
            del self._buffer[:part]
        return len(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is not None:
            self._abort(error)
            return
        try:
            if self._id is None:
                self._client.put_bytes(self._path, bytes(self._buffer))
                return
            if self._buffer:
                self._send(bytes(self._buffer))
            self._wait_for(0)
            self._client.complete_upload(self._path, self._id, self._done, self._size)
        except BaseException as failure:
            self._abort(failure)
            raise
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._client.abort_others(self._path)

    def _send(self, data: bytes) -> None:
        if self._id is None:
            self._id = self._client.begin_upload(self._path)
        self._wait_for(_UNDER_WAY - 1)
        self._number += 1
        self._parts.append(self._pool.submit(self._client.upload_part, self._path, self._id, self._number, data))

    def _wait_for(self, left: int) -> None:
        while len(self._parts) > left:
            self._done.append(self._parts.popleft().result())

    def _abort(self, error: BaseException) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._id is None:
            return
        try:
            self._client.abort_upload(self._path, self._id)
        except (DiffpruneError, OSError) as second:
            kind = error.kind if isinstance(error, RemoteError) else "failed"
            raise RemoteError(
                f"{error}; and the parts that were uploaded could not be removed ({second}): the next run removes them",
                kind,
            ) from error

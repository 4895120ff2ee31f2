"""What storage is asked for: size and version of an object, ranges of bytes, listings, writes; all with retries.

The requests are fsspec's. S3 has a client of its own (``s3``), as there a read can be tied to the version that was
indexed, and the parts of an upload can be retried one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from diffprune.errors import InputError, RemoteError
from diffprune.storage.paths import READ_ONLY, THREADS, RemotePath, Stat
from diffprune.storage.retries import Truncated, retrying

SLOWEST = 1 << 20  # bytes a second; an answer that comes more slowly is asked for again
PATIENCE = 60.0  # seconds that any answer may take
_PACKAGES = {"s3": "fsspec and s3fs", "gs": "fsspec and gcsfs", "memory": "fsspec"}

Item = TypeVar("Item")
Result = TypeVar("Result")


class Client:
    """One kind of storage, through fsspec. Any thread may call it."""

    ties_reads = False  # whether ``get`` fails if the object has another version by then
    options: dict[str, Any] = {"use_listings_cache": False}  # noqa: RUF012 (an object may be replaced meanwhile)

    def __init__(self, scheme: str) -> None:
        try:
            import fsspec

            self.fs = fsspec.filesystem(scheme, skip_instance_cache=True, **self.options)
        except ImportError as error:
            needed = _PACKAGES.get(scheme, "fsspec and aiohttp")
            raise InputError(
                f"{scheme}:// needs the packages {needed} ({error}): pip install 'diffprune[remote]'"
                + (" gcsfs" if scheme == "gs" else "")
            ) from error

    def head(self, path: RemotePath) -> Stat:
        def request() -> Stat:
            about = self._call("info", self._key(path))
            if about.get("type") == "directory":
                raise FileNotFoundError(str(path))
            return _stat(about)

        return retrying(str(path), request)

    def first(self, path: RemotePath, size: int) -> tuple[bytes, Stat]:
        """The first ``size`` bytes, fewer of a smaller object, and what ``head`` tells; only where reads are tied."""
        raise NotImplementedError

    def get(self, path: RemotePath, offset: int, size: int, version: str) -> bytes:
        """``size`` bytes from ``offset``, exactly."""
        if size == 0:
            return b""

        def request() -> bytes:
            data = self._range(path, offset, size, version)
            if len(data) > size:
                raise RemoteError(f"{path}: asked for {size:,} bytes and got more: it gives no ranges", "refused")
            if len(data) != size:
                raise Truncated(f"{size:,} bytes asked for, {len(data):,} received")
            return data

        return retrying(f"{path}, bytes {offset:,} to {offset + size - 1:,}", request)

    def listing(self, folder: RemotePath, begin: str = "") -> dict[str, Stat | None]:
        """Names in a folder that begin so: what is known of objects, None for folders."""

        def request() -> dict[str, Stat | None]:
            try:
                found = self._call("ls", self._key(folder), detail=True)
            except FileNotFoundError:
                return {}
            named = ((one["name"].rstrip("/").rpartition("/")[2], one) for one in found)
            return {
                name: None if one["type"] == "directory" else _stat(one)
                for name, one in named
                if name.startswith(begin)
            }

        if folder.scheme in READ_ONLY:
            raise InputError(f"{folder}: {folder.scheme}:// has no folders; name the files: …/train-{{0000..0127}}.tar")
        return retrying(f"{folder}/{begin}…", request)

    def put(self, path: RemotePath, file: Path) -> None:
        """Make a local file's content an object, in place of any that is there, whole or not at all."""
        refuse_writing(path)
        request = self._pipe if path.scheme == "memory" else self._put
        retrying(str(path), lambda: request(self._key(path), file))

    def delete(self, path: RemotePath) -> None:
        refuse_writing(path)
        retrying(str(path), lambda: self.fs.rm_file(self._key(path)))

    def _range(self, path: RemotePath, offset: int, size: int, version: str) -> bytes:
        return self._call("cat_file", self._key(path), start=offset, end=offset + size, bytes_asked=size)

    def _pipe(self, key: str, file: Path) -> None:
        self.fs.pipe_file(key, file.read_bytes())

    def _put(self, key: str, file: Path) -> None:
        self.fs.put_file(str(file), key)

    def _key(self, path: RemotePath) -> str:
        return self.fs._strip_protocol(os.fspath(path))

    def _call(self, method: str, *args: Any, bytes_asked: int = 0, **options: Any) -> Any:
        """A method of fsspec's, for ``PATIENCE`` seconds at most and what the bytes may take."""
        if not self.fs.async_impl:
            return getattr(self.fs, method)(*args, **options)
        return self._wait(getattr(self.fs, f"_{method}"), *args, bytes_asked=bytes_asked, **options)

    def _wait(self, coroutine: Callable[..., Any], *args: Any, bytes_asked: int = 0, **options: Any) -> Any:
        from fsspec.asyn import sync

        return sync(self.fs.loop, coroutine, *args, timeout=PATIENCE + bytes_asked / SLOWEST, **options)


def client_of(path: RemotePath) -> Client:
    """The client of this process for such a URL."""
    return _client(path.scheme, os.getpid())  # a forked process has no event loop of its parent's


@lru_cache
def _client(scheme: str, _process: int) -> Client:
    if scheme == "s3":
        from diffprune.storage.s3 import S3Client

        return S3Client(scheme)
    return Client(scheme)


def forget_clients() -> None:
    """Make new clients from here on, by what the environment says then."""
    _client.cache_clear()


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """The results in order, ``THREADS`` at a time."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix="storage") as pool:
        return list(pool.map(function, items))


def refuse_writing(path: RemotePath) -> None:
    if path.scheme in READ_ONLY:
        raise InputError(f"{path}: {path.scheme}:// can only be read; give a local path, or s3:// or gs://")


def _stat(about: dict[str, Any]) -> Stat:
    if about.get("size") is None:
        raise RemoteError(
            f"{about.get('name')}: storage does not tell its size, which reading by ranges needs", "refused"
        )
    names = ("ETag", "etag", "generation", "md5Hash", "mtime", "Last-Modified", "LastModified", "created")
    version = next((str(about[name]) for name in names if about.get(name)), "")
    return Stat(int(about["size"]), version.strip('"'))

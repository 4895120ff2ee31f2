"""Paths that may be URLs."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from diffprune.errors import InputError, RemoteError

SCHEMES = ("s3", "gs", "https", "http", "memory")
READ_ONLY = ("https", "http")
THREADS = 16  # requests of one process at a time

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_FOLDED = re.compile(r"(s3|gs|https?|memory):/(?!/)")  # a URL that went through pathlib, which makes one slash of two
_COMMAND = re.compile(r"(pipe|gopen):")
_ASK_ONE_BY_ONE = 8  # up to so many objects; more are found by listing what their names begin with


class Stat(NamedTuple):
    """Of an object: its size in bytes, and its ETag or whatever else changes when it does ("" if nothing is said)."""

    st_size: int
    version: str


class RemotePath(os.PathLike):
    """The URL of an object, or of what its names begin with, which is shown as a folder.

    What reads or writes raises FileNotFoundError for a missing object and ``RemoteError`` where storage fails. ``str``
    leaves out what follows the "?" of an ``https://`` URL, as it may be a signature; ``os.fspath`` has it all.
    """

    __slots__ = ("_query", "_url")

    def __init__(self, url: str) -> None:
        found = _URL.fullmatch(url)
        if found is None or found[1].lower() not in SCHEMES or "::" in url:
            raise InputError(f"{url}: expected a local path or a URL of {', '.join(f'{s}://' for s in SCHEMES)}")
        scheme, rest = found[1].lower(), found[2]
        query = ""
        if scheme in READ_ONLY:
            rest, mark, query = rest.partition("?")
            query = mark + query
            if "@" in rest.partition("/")[0]:
                raise InputError(f"{scheme}://…@…: expected no user name or password in a URL")
        rest = rest.rstrip("/")
        if not rest or rest.startswith("/"):
            raise InputError(f"{url}: expected a URL such as {scheme}://bucket/folder/name")
        self._url, self._query = f"{scheme}://{rest}", query

    @property
    def scheme(self) -> str:
        return self._url.partition(":")[0]

    @property
    def name(self) -> str:
        return self._rest.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def stem(self) -> str:
        return Path(self.name).stem

    @property
    def parent(self) -> RemotePath:
        above = self._rest.rpartition("/")[0]
        return RemotePath(f"{self.scheme}://{above}") if above else self  # what signs one object signs no other

    @property
    def _rest(self) -> str:
        return self._url.partition("://")[2]

    def __truediv__(self, name: str | os.PathLike) -> RemotePath:
        return RemotePath(f"{self._url}/{os.fspath(name)}{self._query}")

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def __str__(self) -> str:
        return self._url + ("?…" if self._query else "")

    def __fspath__(self) -> str:
        return self._url + self._query

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and os.fspath(self) == os.fspath(other)

    def __lt__(self, other: RemotePath) -> bool:
        return os.fspath(self) < os.fspath(other)

    def __hash__(self) -> int:
        return hash(os.fspath(self))

    def resolve(self) -> RemotePath:
        """Itself: there are no links."""
        return self

    def is_relative_to(self, folder: AnyPath) -> bool:
        return isinstance(folder, RemotePath) and f"{self._url}/".startswith(f"{folder._url}/")

    def relative_to(self, folder: AnyPath) -> str:
        if not (isinstance(folder, RemotePath) and self.is_relative_to(folder)):
            raise ValueError(f"{self} is not below {folder}")
        return self._url[len(folder._url) + 1 :]

    def stat(self) -> Stat:
        """Size and version; one request. FileNotFoundError if it is no object."""
        from diffprune.storage.clients import client_of

        return client_of(self).head(self)

    def is_file(self) -> bool:
        return self._stat() is not None

    def _stat(self) -> Stat | None:
        """Size and version, or None where there is no object."""
        try:
            return self.stat()
        except FileNotFoundError:
            return None
        except RemoteError as error:
            if self.scheme in READ_ONLY and error.kind == "denied":  # as storage behind a web server may say "missing"
                return None
            raise

    def is_dir(self) -> bool:
        """Whether an object's name begins with this one and a slash."""
        return self.scheme not in READ_ONLY and any(True for _ in self._listed())

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def iterdir(self) -> Iterator[RemotePath]:
        """Objects and folders in this folder, none if there is no such folder."""
        return (self / name for name in self._listed())

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Objects in this folder whose names match a pattern without slashes."""
        begin = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
        found = self._listed(begin)
        return (self / name for name in sorted(found) if found[name] is not None and fnmatch.fnmatchcase(name, pattern))

    def read_bytes(self) -> bytes:
        from diffprune.storage.reading import read_whole

        return read_whole(self)

    def read_text(self, encoding: str = "utf-8") -> str:
        return self.read_bytes().decode(encoding)

    def mkdir(self, parents: bool = True, exist_ok: bool = True) -> None:
        """Nothing, as storage has no folders; InputError where nothing can be written."""
        from diffprune.storage.clients import refuse_writing

        refuse_writing(self)

    def unlink(self, missing_ok: bool = False) -> None:
        from diffprune.storage.clients import client_of

        if missing_ok and not self.is_file():  # deleting may be denied, or leave a mark, where there is nothing
            return
        client_of(self).delete(self)

    def _listed(self, begin: str = "") -> dict[str, Stat | None]:
        """Names in this folder that begin so: what is known of objects, None for folders."""
        from diffprune.storage.clients import client_of

        return client_of(self).listing(self, begin)


AnyPath = Path | RemotePath


def as_path(path: str | os.PathLike) -> AnyPath:
    """A ``Path``, or a ``RemotePath`` of a URL; InputError for a URL of another kind, or a command."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if _COMMAND.match(text):
        raise InputError(f"{text}: names a command, and diffprune runs none; give a path or a URL")
    text = _FOLDED.sub(r"\1://", text, count=1) if _FOLDED.match(text) else text
    return RemotePath(text) if _URL.match(text) else Path(path)


def is_remote(path: str | os.PathLike) -> bool:
    return isinstance(as_path(path), RemotePath)


def local_path(path: str | os.PathLike, what: str) -> Path:
    """As ``as_path``; InputError for a URL, where ``what`` can only be on local disk."""
    found = as_path(path)
    if isinstance(found, RemotePath):
        raise InputError(f"{found}: {what} cannot be a URL yet; copy it to local disk, or give a local path")
    return found


def for_arrow(path: Path) -> Path:
    """The path as pyarrow has to get it, which takes the "~" that a relative one may begin with for a home folder, and
    what stands before a colon, as in "run:1/scores", for the scheme of a URL."""
    return path.absolute()


def existing(paths: Iterable[AnyPath]) -> set[AnyPath]:
    """Which of these are files; as ``stats``."""
    return set(stats(paths))


def stats(paths: Iterable[AnyPath]) -> dict[AnyPath, Stat]:
    """Size of those of these that are files, and version of objects.

    Many objects of one folder cost one listing, not a request each.
    """
    paths = list(paths)
    found: dict[AnyPath, Stat]
    found = {path: about for path in paths if isinstance(path, Path) and (about := _stat_on_disk(path)) is not None}
    folders: dict[RemotePath, list[RemotePath]] = {}
    for path in paths:
        if isinstance(path, RemotePath):
            folders.setdefault(path.parent, []).append(path)
    for folder, ours in folders.items():
        one_by_one = ours
        if len(ours) > _ASK_ONE_BY_ONE and folder.scheme not in READ_ONLY:
            listed = folder._listed(_common_begin(min(ours).name, max(ours).name))
            there = {path: about for path in ours if (about := listed.get(path.name)) is not None}
            found |= {path: about for path, about in there.items() if about.version}
            one_by_one = [path for path in there if path not in found]  # some servers' listings have no ETag
        if one_by_one:
            from diffprune.storage.clients import in_threads

            asked = zip(one_by_one, in_threads(RemotePath._stat, one_by_one), strict=True)
            found |= {path: about for path, about in asked if about is not None}
    return found


def _stat_on_disk(path: Path) -> Stat | None:
    try:
        about = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Stat(about.st_size, "") if stat.S_ISREG(about.st_mode) else None


def _common_begin(one: str, other: str) -> str:
    """The characters that two names begin with; of the first and last of sorted names, those of all."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]

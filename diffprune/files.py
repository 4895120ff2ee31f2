"""Files that are there whole or not at all: written under a temporary name, fsynced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from diffprune.errors import InputError, ResumeError, short
from diffprune.outputs import copy_to_stream, is_stdout, is_stream
from diffprune.storage import AnyPath, RemotePath, as_path

if TYPE_CHECKING:
    from diffprune.storage.writing import Writer

TEMPORARY_PREFIX = ".tmp-"
_writer = ""


def set_writer(name: str) -> None:
    """Put ``name`` into this process's temporary names: another one may be writing the same file, the same bytes."""
    global _writer
    _writer = name


@contextmanager
def atomic_path(path: str | os.PathLike, *, sync_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; it becomes ``path`` if the block ends without an exception.

    The temporary name is a function of ``path``, so a run that was killed leaves at most one such file, which
    the next run overwrites. ``sync_folder=False`` leaves it to the next file of the folder to make the name, not the
    content, last through a power cut. A URL becomes an object in the same way; the temporary file is local then. A link
    stays: what it points to is replaced. A pipe, a terminal and standard output ("-") get the bytes at the end.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        from diffprune.storage.writing import writing_file

        with writing_file(path) as temporary:
            yield temporary
        return
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            try:
                copy_to_stream(Path(folder) / path.name, path)
            except OSError as error:
                _raise_named(error, "standard output" if is_stdout(path) else path)
                raise
        return
    path = _linked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY_PREFIX + _writer + path.name)
    try:
        yield temporary
        _fsync(temporary)
        os.replace(temporary, path)
        if sync_folder:
            _fsync(path.parent)
    except OSError as error:
        _raise_named(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: AnyPath, *, buffering: int = -1, sync_folder: bool = True) -> Iterator[Writer]:
    """As ``atomic_path``, but yield what to write to: a file of the temporary path, or an upload to a URL."""
    if isinstance(path, RemotePath):
        from diffprune.storage.writing import writing

        with writing(path) as target:
            yield target
        return
    with atomic_path(path, sync_folder=sync_folder) as temporary, open(temporary, "wb", buffering=buffering) as file:
        yield file


@contextmanager
def atomic_dir(path: str | os.PathLike, *, last: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; it becomes ``path`` if the block ends without an exception.

    A folder already at ``path`` is replaced. Of a URL the files become objects one by one, in place of those of their
    names, that of the name ``last`` after all others: it is the proof that they are there.
    """
    path = as_path(path)
    if isinstance(path, RemotePath):
        from diffprune.storage.writing import writing_folder

        with writing_folder(path, last) as temporary:
            yield temporary
        return
    path = _linked(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        _raise_named(error, path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write ``value`` as indented JSON with sorted keys, atomically. NaN and infinity are refused."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike, *, unique: bool = False) -> Any:
    """Read a JSON file; raises InputError that names it if it is missing or malformed (NaN and infinity are no JSON),
    or, where names have to be ``unique``, if an object has one twice."""

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: {twice!r} stands in it twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    def whole(digits: str) -> int:
        if len(digits) > 300:  # near what a float holds
            refuse(f"a number of {len(digits):,} digits")
        return int(digits)

    path, hook = as_path(path), mapping if unique else None
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=hook, parse_constant=refuse, parse_int=whole)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def check_fields(path: AnyPath, found: Mapping[str, Any], types: Mapping[str, type], remedy: str = "") -> None:
    """InputError, with the ``remedy``, unless an object of a JSON file has these fields, each of its type."""
    for name, expected in types.items():
        if type(found.get(name)) is not expected:
            raise InputError(f"{path}: {name}: expected {expected.__name__}, found {short(found.get(name))}{remedy}")


def is_begun(out: AnyPath, manifest: str) -> bool:
    """Whether the folder ``out`` holds its manifest, a run's first file. ResumeError where it holds other files only.

    Processes may begin one run at once, so what is half-written says nothing, and the manifest is looked for again
    after the folder was listed.
    """
    if (out / manifest).is_file():
        return True
    others = out.is_dir() and any(not path.name.startswith(TEMPORARY_PREFIX) for path in out.iterdir())
    begun = (out / manifest).is_file()
    if others and not begun:
        raise ResumeError(f"{out}: holds other files; give an empty or new folder")
    return begun


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a file, or the object behind a URL, to read its bytes from front to back or anywhere."""
    path = as_path(path)
    if isinstance(path, RemotePath):
        from diffprune.storage.reading import open_remote

        return open_remote(path)
    return open(path, "rb")


def sha256_file(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-able value: equal values, equal fingerprints."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _raise_named(error: OSError, path: str | os.PathLike) -> None:
    """Name ``path`` where a disk is full or a file too large: a write to an open file says that without a name."""
    if (is_disk_full(error) or error.errno == errno.EFBIG) and error.filename is None:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error


def is_disk_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _linked(path: Path) -> Path:
    """What a link points to in the end, there or not; any other path as it is."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise InputError(f"{path}: a link that leads back to itself; remove it")
    return target


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A file that a user names to be written: what it may replace, and where it is a pipe or a terminal."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diffprune.errors import InputError
from diffprune.storage import AnyPath, RemotePath, as_path

STDOUT = "-"
_DESCRIPTORS = {STDOUT: 1, "/dev/stdout": 1, "/dev/stderr": 2}
_READ_AT_MOST = 16 << 20
_BINARY = (b"PAR1", b"\x89PNG", b"\x93NUMPY", b"PK\x03\x04", b"\x1f\x8b", b"\xff\xd8\xff")


class Kind(NamedTuple):
    """What a file holds, and the bytes that tell: a binary file begins with them, a text has them somewhere in it.

    ``is_list``: a text whose lines are all ended, none of them empty or there twice, which is all that tells.
    """

    name: str
    mark: bytes
    is_text: bool = True
    is_list: bool = False

    def found_in(self, data: bytes) -> bool:
        """Whether a file's first bytes may be those of such a file; an empty file may become anything."""
        if not self.is_text or not data:
            return data[: len(self.mark)] == self.mark or not data
        if self.is_list:
            *lines, rest = data.split(b"\n")
            if not all(lines) or len(set(lines)) < len(lines) or (rest and len(data) < _READ_AT_MOST):
                return False
        return not data.startswith(_BINARY) and b"\0" not in data[:1024] and self.mark in data


PNG = Kind("PNG picture", b"\x89PNG", is_text=False)
NPY = Kind(".npy array", b"\x93NUMPY", is_text=False)
PARQUET = Kind("parquet table", b"PAR1", is_text=False)
HTML = Kind("HTML page", b"<!doctype html>")
KEY_LIST = Kind("text with a key a line", b"", is_list=True)


def check_output(out: str | os.PathLike, kind: Kind, others: Iterable[str | os.PathLike | None] = ()) -> None:
    """Raise InputError if ``out`` is one of the ``others``, files that the same command reads or writes, or if it is
    there and clearly nothing that an earlier run could have written: a folder, or a file of another kind.
    """
    out = as_path(out)
    for other in others:
        if other is not None and _is_same(out, as_path(other)):
            raise InputError(f"{out}: the same file as {other}, which this command needs; write to another file")
    if isinstance(out, RemotePath) or is_stream(out) or not out.exists():
        return
    if out.is_dir():
        raise InputError(f"{out}: expected a file to write, found a folder")
    with open(out, "rb") as file:
        data = file.read(_READ_AT_MOST)
    if not kind.found_in(data):
        raise InputError(f"{out}: already there and no {kind.name} of an earlier run; write to another file")


def is_stream(path: AnyPath) -> bool:
    """Whether what is written goes by and is gone: into a pipe, a terminal, an open descriptor such as
    /dev/fd/63, or standard output.

    Raises InputError for a disk or a socket, which nothing here writes to.
    """
    if isinstance(path, RemotePath):
        return False
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        return True
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return False
    raise InputError(f"{path}: expected a file to write, found a disk or a socket")


def is_stdout(path: str | os.PathLike) -> bool:
    """Whether a path means standard output: then nothing else may be printed there."""
    return _descriptor(as_path(path)) == 1


def copy_to_stream(source: Path, path: Path) -> None:
    """Write a file's bytes to what ``is_stream`` says is one, or to standard output."""
    with open(source, "rb") as file:
        if is_stdout(path) and hasattr(sys.stdout, "buffer"):
            sys.stdout.flush()  # what was printed before comes first
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        number = _descriptor(path)
        # Not by its name, which would begin at the front of a file that others go on writing to.
        with open(path if number is None else number, "wb", closefd=number is None) as stream:
            shutil.copyfileobj(file, stream)


def _descriptor(path: AnyPath) -> int | None:
    text = str(path)
    found = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", text)
    return int(found[1]) if found else _DESCRIPTORS.get(text)


def _is_same(one: AnyPath, other: AnyPath) -> bool:
    if isinstance(one, RemotePath) or isinstance(other, RemotePath):
        return one == other
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there yet
        return os.path.realpath(one) == os.path.realpath(other)

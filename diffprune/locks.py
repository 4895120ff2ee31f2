"""One run at a time in a folder. The system lets go of a lock when its holder dies: none is ever stale.

Locks are ``flock``s on files of their own, which are removed when they are let go; one that a killed run left behind
is nobody's lock. On NFS they hold between machines. Where a file system has no locks, a warning says so. A URL is
locked for this machine only, in the cache folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffprune.errors import BusyError, InputError
from diffprune.files import TEMPORARY_PREFIX
from diffprune.storage import AnyPath, RemotePath, as_path
from diffprune.storage.folders import lock_folder

LOCK_FILE = TEMPORARY_PREFIX + "lock"
WAIT_SECONDS = 3.0  # workers of a run that was killed end within milliseconds
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def folder_lock(out: str | os.PathLike, *, shared: bool = False) -> Iterator[int]:
    """Hold ``out``, which is made if it is not there; yields the lock's descriptor.

    Exclusive, or ``shared`` by the parts of one run, which then claim their shards one by one. A process that has a
    duplicate of the descriptor holds the lock too. Raises BusyError that names the holder, or InputError for a folder
    that cannot be written to.
    """
    out, given = lock_folder(out), as_path(out)
    if isinstance(given, RemotePath):
        given.mkdir()
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"{out}: expected a folder, found a file") from None
    except OSError as error:
        raise _unwritable(out, error) from error
    other = "a run of the whole" if shared else "another run, or a part of one,"
    message = f"{given}: {other} is at work there: %s; wait for its end, or give another folder"
    try:
        with _lock(out / LOCK_FILE, shared, message) as descriptor:
            yield descriptor
    finally:
        if is_new:
            with suppress(OSError):  # it is not empty, as it should be
                out.rmdir()


@contextmanager
def shard_claim(out: str | os.PathLike, stem: str) -> Iterator[None]:
    """Hold one shard of ``out``; raises BusyError if another process does."""
    message = (
        f"{out}: shard {stem} is being done by %s: parts of one run must not overlap; what is finished is kept, and "
        f"this part can be run again"
    )
    with _lock(lock_folder(out) / f"{LOCK_FILE}-{stem}", False, message):
        yield


def is_lock(path: AnyPath) -> bool:
    """Whether a file is a lock, held or left behind."""
    return path.name.startswith(LOCK_FILE)


@contextmanager
def _lock(path: Path, shared: bool, message: str) -> Iterator[int]:
    """``message`` has a %s for who holds it."""
    descriptor, locks = _taken(path, shared, message)
    try:
        yield descriptor
    finally:
        if locks:
            _remove(path, descriptor, shared)
        else:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _taken(path: Path, shared: bool, message: str) -> tuple[int, bool]:
    """The descriptor, and whether the file system has locks."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _unwritable(path.parent, error) from error
        locks = True
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise BusyError(message % holder) from None
            time.sleep(0.02)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
            locks = False
            warnings.warn(
                f"{path.parent}: no locks on this file system ({error.strerror}): be sure that only one run writes "
                "there",
                stacklevel=4,
            )
        if not locks or _is_still(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            return descriptor, locks
        os.close(descriptor)  # its last holder removed it in between


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the locked file is the one that has this name."""
    try:
        named = os.stat(path)
    except FileNotFoundError:
        return False
    held = os.fstat(descriptor)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _remove(path: Path, descriptor: int, shared: bool) -> None:
    """Remove the file, unless others share the lock."""
    if shared:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    if _is_still(path, descriptor):
        path.unlink(missing_ok=True)


def _unwritable(out: Path, error: OSError) -> OSError | InputError:
    """What to raise: InputError where the folder cannot be written to."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return error
    return InputError(f"{out}: cannot be written to ({error.strerror}); give a folder that can, or change its mode")

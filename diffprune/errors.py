"""What can go wrong that a user can mend. The command line prints these without a traceback and exits 1."""

from __future__ import annotations


class DiffpruneError(Exception):
    """An error whose message says which file and key, what was expected, what was found, what to do."""


class InputError(DiffpruneError, ValueError):
    """A shard, image, table, checkpoint, config or argument that cannot be used as it is."""


class ResumeError(DiffpruneError):
    """The output folder holds work of another run: other inputs, another config or another seed."""


class DiskFullError(DiffpruneError):
    """A stage ran out of disk; what it had finished is kept."""


class RemoteError(DiffpruneError):
    """An object behind a URL could not be read or written; what was finished is kept.

    ``kind``: "failed" (storage kept failing, however often it was asked), "denied", "expired" (credentials), "changed"
    (the object is not the one that was indexed), "refused" (anything else that storage will not do).
    """

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str]]:
        return RemoteError, (str(self), self.kind)


def short(value: object) -> str:
    """The value as a message shows it: a key from a stranger may be as long as it likes."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text):,} characters)"


class BusyError(DiffpruneError):
    """Another run is at work in the output folder, or on the same shard."""


class WorkerError(DiffpruneError):
    """A worker process died again and again at one shard."""


class StoppedError(DiffpruneError):
    """So many samples in a row failed that something bigger than single images is wrong; finished shards are kept."""

"""Files on local disk and objects behind a URL, for every stage alike.

``as_path`` makes of what a user gave a ``Path`` or, of a URL, a ``RemotePath`` with the part of ``Path``'s interface
that stages use. Local files are read and written as ever and know nothing of this package; objects go through fsspec,
which is imported by the first URL.
"""

from diffprune.storage.paths import (
    THREADS,
    AnyPath,
    RemotePath,
    Stat,
    as_path,
    existing,
    for_arrow,
    is_remote,
    local_path,
    stats,
)

__all__ = [
    "THREADS",
    "AnyPath",
    "RemotePath",
    "Stat",
    "as_path",
    "existing",
    "for_arrow",
    "is_remote",
    "local_path",
    "stats",
]

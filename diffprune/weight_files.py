"""Files of tensors from other programs: ``.safetensors``, and pickles of which nothing but tensors is taken."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffprune.errors import InputError
from diffprune.storage import AnyPath

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"

# Lightning's .ckpt files have its callbacks' classes as keys of a dictionary beside the state dict, and in their state
# numbers of NumPy's.
_LIGHTNING = (
    "pytorch_lightning.",
    "lightning.",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)


# What torch.load raises for bytes that are no checkpoint, or half of one (EINVAL, for a seek before the file's start).
_DAMAGED: tuple[type[Exception], ...]
_DAMAGED = (pickle.UnpicklingError, struct.error, RuntimeError, EOFError, ValueError, KeyError, TypeError)
_DAMAGED += (AttributeError, OSError)


class Inert:
    """Stands in for a class named in a checkpoint: it takes anything and does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def read_weights(path: Path, under: Sequence[str] = (), name: AnyPath | None = None) -> dict[str, Tensor]:
    """The state dict of a ``.safetensors`` file, or of a ``.pt``, ``.pth`` or ``.ckpt``, on the CPU.

    A ``.pt`` is a pickle: only tensors and plain containers are accepted (``weights_only=True``), never code; what
    Lightning leaves beside them is read as names that mean nothing. ``under``: names that the state dict may lie under,
    the first found is taken. ``name``: what errors call the file.

    Raises: InputError for a file that is missing, damaged, or holds anything else.
    """
    name = name or path
    if not path.is_file():
        raise InputError(f"{name}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{name}: not a readable safetensors file ({error})") from error
    try:
        with _lightning_names(path):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: expected a state dict of tensors and nothing else ({reason})") from error
    if isinstance(tensors, dict):
        tensors = next((tensors[one] for one in under if isinstance(tensors.get(one), dict)), tensors)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{name}: expected a state dict of tensors, found {type(tensors).__name__}")
    return dict(tensors)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: AnyPath) -> None:
    """Raise InputError, naming the file and tensor, unless names, shapes and dtypes are those of ``expected``."""
    for name, want in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: tensor {name!r} is missing: expected {_describe(want)}")
        got = tensors[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise InputError(f"{path}: tensor {name!r}: expected {_describe(want)}, found {_describe(got)}")
    for name, got in tensors.items():
        if name not in expected:
            raise InputError(f"{path}: tensor {name!r} {_describe(got)} is not part of this model's config")


def diffusers_folder(path: AnyPath, *within: str) -> AnyPath | None:
    """Where diffusers' ``config.json`` lies: in ``path``, or in one of these folders of a pipeline's; else None."""
    folders = (path, *(path / name for name in within))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def substituted(name: str, rules: Iterable[tuple[str, str]]) -> str:
    """A tensor's name after these substitutions, (pattern, replacement), one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def no_diffusers_weights(path: AnyPath) -> InputError:
    return InputError(
        f"{path}: no such file; download it from where config.json came from, into this folder "
        "(diffusion_pytorch_model.bin is a pickle, and is not read)"
    )


def in_float32(tensors: Mapping[str, Tensor], path: AnyPath) -> dict[str, Tensor]:
    """Weights in half precision as float32; others as they are.

    Raises InputError, naming the file and tensor, for values that are not finite, and for those of a byte or less: what
    scales them lies elsewhere.
    """
    found = {}
    for name, value in tensors.items():
        if value.is_floating_point() and value.element_size() == 1:
            raise InputError(
                f"{path}: tensor {name!r}: expected float32, float16 or bfloat16, found {_describe(value)}; take the "
                "file that this one was quantised from"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise InputError(f"{path}: tensor {name!r} has values that are not finite; download the file again")
        found[name] = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    return found


def _lightning_names(path: Path) -> AbstractContextManager:
    """While a pickle is read: names of what Lightning leaves mean ``Inert``. Nothing is imported for them."""
    if not zipfile.is_zipfile(path):  # older than any of Lightning's
        return nullcontext()
    names = [name for name in torch.serialization.get_unsafe_globals_in_checkpoint(path) if name.startswith(_LIGHTNING)]
    return torch.serialization.safe_globals([(Inert, name) for name in names])


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"

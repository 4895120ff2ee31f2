"""NumPy and CuPy arrays where an op takes tensors: used where they lie, without a copy, and answered in kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from inspect import signature
from operator import index
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
Array = TypeVar("Array", bound=Any)
"""A torch, NumPy or CuPy array, in the signatures of ops: those of one call are of one kind, and so is the answer."""

LIBRARIES = ("numpy", "cupy")
"""Never imported here: who passes an array of theirs has imported them."""

AS_THEY_ARE = {
    "Array": Tensor,
    "Array | None": (Tensor, type(None)),
    "int": (int, torch.SymInt),
    "bool": (bool, int),
    "str": str,
}
"""Annotations in the signatures of ops -> values that are passed on."""


def any_array(op: Function) -> Function:
    """The op, which takes NumPy or CuPy arrays too and then returns such arrays; those of one call are of one kind.

    Arrays are handed over by DLPack. Copied are those that torch cannot read as they are: with negative strides, of a
    foreign byte order, not aligned; before NumPy 2.1 read-only ones too. CuPy's wait for each other on the GPU alone.
    Raises ValueError for arrays of several kinds, for what is no array, for a mask, for dtypes that torch has not, and
    for other arguments of another type than the op's.
    """
    parameters = signature(op)
    kinds = {name: AS_THEY_ARE[parameter.annotation] for name, parameter in parameters.parameters.items()}
    positional = tuple(kinds.values())

    @wraps(op)
    def run(*args: Any, **options: Any) -> Any:
        given = zip(args, positional)  # noqa: B905 (too many: the op says so)
        named = ((value, kinds.get(name, object)) for name, value in options.items())
        if all(isinstance(value, kind) for value, kind in (*given, *named)):
            return op(*args, **options)
        return _run(op, parameters.bind(*args, **options), parameters.parameters)

    run.__code__ = run.__code__.replace(co_name=op.__name__)  # one of its own: Dynamo compiles a code 8 times at most
    return run


def _run(op: Callable[..., Any], bound: Any, parameters: Any) -> Any:
    libraries = {}
    for name, value in bound.arguments.items():
        annotation = parameters[name].annotation
        if annotation == "Array" or (annotation == "Array | None" and value is not None):
            libraries[name] = _library(name, value)
        elif not isinstance(value, AS_THEY_ARE[annotation]):
            bound.arguments[name] = _plain(name, value, annotation)
    if len(set(libraries.values())) > 1:
        names = ", ".join(f"{name} of {library.__name__}" for name, library in libraries.items())
        raise ValueError(f"expected arrays of one kind, got {names}")
    library = next(iter(libraries.values()))
    if library is torch:
        return op(*bound.args, **bound.kwargs)
    bound.arguments |= {name: _tensor(name, bound.arguments[name]) for name in libraries}
    found = op(*bound.args, **bound.kwargs)
    return tuple(_array(x, library) for x in found) if isinstance(found, tuple) else _array(found, library)


def _library(name: str, value: Any) -> ModuleType:
    if isinstance(value, Tensor):
        return torch
    for library in map(sys.modules.get, LIBRARIES):
        if library is not None and isinstance(value, library.ndarray):
            return library
    raise ValueError(f"expected {name} as a torch, NumPy or CuPy array, got {type(value).__name__}")


def _plain(name: str, value: Any, annotation: str) -> int:
    """Integers of NumPy and others."""
    try:
        if annotation in ("int", "bool"):
            return index(value)
    except TypeError:
        pass
    raise ValueError(f"expected {name} of type {annotation}, got {value!r}")


def _tensor(name: str, array: Any) -> Tensor:
    if hasattr(array, "mask"):
        raise ValueError(f"expected {name} without a mask, got {type(array).__name__}")
    regular = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    try:
        # torch ends the process at a negative stride
        if not (regular and array.dtype.isnative and getattr(array.flags, "aligned", True)):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        try:
            return torch.from_dlpack(array)
        except BufferError:
            return torch.from_dlpack(array.copy())
    except BufferError as error:
        raise ValueError(f"expected {name} of a dtype that torch has, got {array.dtype}: {error}") from error


def _array(tensor: Tensor, library: ModuleType) -> Any:
    return tensor.numpy() if library.__name__ == "numpy" else library.from_dlpack(tensor)

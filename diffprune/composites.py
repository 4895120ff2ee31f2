"""Torch functions that are written in Python: what counts is what they call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType


class _Open(threading.local):
    """The functions that this thread is looking into."""

    def __init__(self) -> None:
        self.functions: list[Callable] = []


_open = _Open()


def name_of(func: Callable) -> str:
    return getattr(func, "__name__", str(func))


def is_composite(func: Callable) -> bool:
    """Whether it is written in Python: what it calls is what counts. One that calls itself is its own last word."""
    return isinstance(func, FunctionType) and func not in _open.functions


@contextmanager
def looked_into(func: Callable) -> Iterator[None]:
    _open.functions.append(func)
    try:
        yield
    finally:
        _open.functions.pop()


@cache
def body(func: FunctionType) -> FunctionType:
    """A torch function written in Python, without its own dispatch: what it calls is dispatched instead."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    own = func.__globals__ | dict.fromkeys(names, lambda *_: False)
    copy = FunctionType(func.__code__, own, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy

"""Which implementation of an op runs, and why the others refused.

An implementation is a module ``kernels/<name>/<op>.py`` with ``run(*args)`` and, unless it takes every input the op
takes, ``refuse(*args) -> str | None``: the reason it cannot take this one. ``kernels/<name>/__init__.py`` has
``unavailable() -> str | None``: the reason none of its modules can run on this machine; they are not imported then.
A new implementation is a new file: nothing is edited.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from diffprune.errors import InputError

PREFERENCE = ("cuda", "triton", "cpp", "cpu", "reference")
"""Names of implementations; ``impl="auto"`` takes the first that does not refuse and is neither unconfirmed nor
emulated. An op may have another order: where PyTorch's own op is there too, and nothing here has been measured to be
faster, that comes first."""

UNCONFIRMED = frozenset({"cuda", "triton"})
"""Implementations that no GPU of ours has run yet: they run when asked for by name, and "auto" passes them over, but
for those that ``CONFIRMED`` names."""

CONFIRMED = "DIFFPRUNE_CONFIRMED"
"""The environment variable by which a user says what the GPU here has confirmed, as ``python -m benchmarks.gpu`` puts
it: implementations, or ops of one, with commas: "triton", or "triton:kmeans_assign,cuda:linear_grad_dot"."""

_ops: dict[str, Op] = {}


def report() -> dict[str, dict[str, str | None]]:
    """Per op, the implementations that exist: None if it can run on this machine, else the reason why it cannot.

    In the order in which "auto" tries them, which passes over those that are ``unconfirmed``.
    """
    return {
        name: {n: module if isinstance(module, str) else None for n, module in op.implementations.items()}
        for name, op in sorted(_ops.items())
    }


def orders() -> dict[str, tuple[tuple[str, ...], str]]:
    """Per op whose order is not the usual one: the order of its implementations, and on what evidence."""
    unusual = {name: op for name, op in sorted(_ops.items()) if op.preference != PREFERENCE}
    return {name: (tuple(op.implementations), op.because) for name, op in unusual.items()}


def unconfirmed(op: str) -> frozenset[str]:
    """The implementations of ``op`` that "auto" passes over. InputError for names in ``CONFIRMED`` that are unknown."""
    return UNCONFIRMED - _confirmed(os.environ.get(CONFIRMED, ""), op)


@cache
def _confirmed(said: str, op: str) -> frozenset[str]:
    found = set()
    for part in filter(None, (part.strip() for part in said.split(","))):
        name, _, one = part.partition(":")
        if name not in PREFERENCE or (":" in part and one not in _ops):
            ops = ", ".join(sorted(_ops))
            raise InputError(
                f"{CONFIRMED}: expected implementations, or ops of one, such as triton or triton:kmeans_assign, got "
                f"{part!r}; implementations: {', '.join(PREFERENCE)}; ops: {ops}"
            )
        if one in ("", op):
            found.add(name)
    return frozenset(found)


class Op:
    """One op and its implementations. Calling it runs one of them."""

    def __init__(self, name: str, preference: tuple[str, ...] = PREFERENCE, because: str = "") -> None:
        """``because``: why this op's order is not the usual one."""
        self.name, self.preference, self.because = name, preference, because
        _ops[name] = self

    def __call__(self, impl: str, *args: Any) -> Any:
        """Run ``impl`` on ``args``, their GPU being the current one; see ``choose``."""
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda]
        with torch.cuda.device_of(tensors[0]) if tensors else nullcontext():
            return self.choose(impl, *args).run(*args)

    def choose(self, impl: str, *args: Any) -> ModuleType:
        """The implementation ``impl``, or with "auto" the first in order of preference that takes ``args``.

        Raises ValueError for an unknown name, and NotImplementedError, with the reason of each implementation, if
        ``impl`` cannot run: a named implementation is never replaced by another.
        """
        if impl not in ("auto", *self.preference):
            names = ", ".join(("auto", *self.preference))
            raise ValueError(f"{self.name}: expected impl to be one of {names}, got {impl!r}")
        for name in self._candidates() if impl == "auto" else [impl]:
            if self.refusal(name, *args) is None:
                return self.implementations[name]
        reasons = "\n".join(f"  {name}: {self.refusal(name, *args) or 'would run'}" for name in self.preference)
        raise NotImplementedError(f"{self.name}: impl={impl!r} cannot run this\n{reasons}")

    def _candidates(self) -> list[str]:
        passed_over = unconfirmed(self.name)
        return [name for name in self.preference if name not in passed_over and not _emulated(name)]

    def refusal(self, name: str, *args: Any) -> str | None:
        """Why implementation ``name`` cannot run ``args``; None if it can."""
        module = self.implementations.get(name, "does not exist for this op")
        if isinstance(module, str):
            return module
        refuse = getattr(module, "refuse", None)
        return refuse(*args) if refuse else None

    @cached_property
    def implementations(self) -> dict[str, ModuleType | str]:
        """The implementations that exist, in order of preference: the module, or why it cannot run on this machine."""
        found: dict[str, ModuleType | str] = {}
        for name in self.preference:
            package = f"{__package__}.{name}"
            if find_spec(package) and find_spec(f"{package}.{self.name}"):
                reason = import_module(package).unavailable()
                found[name] = reason if reason else import_module(f"{package}.{self.name}")
        return found


@cache
def _emulated(name: str) -> bool:
    package = f"{__package__}.{name}"
    return find_spec(package) is not None and getattr(import_module(package), "emulated", lambda: False)()

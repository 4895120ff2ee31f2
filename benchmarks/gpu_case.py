"""What a benchmark is: one op at one size, the ways to compute it, the goal, and how to tell a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from diffprune.kernels import report


@dataclass(frozen=True)
class Goal:
    """What an implementation of ours should reach, as a ratio of two measurements of one run."""

    text: str
    kind: str
    """"faster": against's best median / ours; "copy", "matmul", "bound": share of that ceiling; "part": ours / the
    median of the same implementation and case of the op against[0]."""
    factor: float
    """At least this; for "part" at most."""
    against: tuple[str, ...] = ()
    """Names of comparisons (each matches the names that start with it), or of an op."""


@dataclass(frozen=True)
class Way:
    """One way to compute a case."""

    name: str
    run: Callable[..., Any]
    ours: bool = False
    check: Callable[[tuple, Any], float] | None = None
    """Inputs and output -> error; None where it computes less than the op."""
    tolerance: float = inf
    """Largest error that is not wrong."""
    missing: str | None = None
    """Why it cannot run here."""


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    label: str
    shape: dict[str, int]
    dtype: str
    make: Callable[[torch.Generator], tuple]
    """Fresh random inputs on the generator's device."""
    ways: Callable[[], list[Way]]
    bytes: int
    """Fewest that an implementation must move: each input read once, each output written once."""
    operations: int
    """Fewest floating-point operations of the best form, where they are those of a matrix product; else 0."""
    goals: tuple[Goal, ...] = field(default=())


@dataclass(frozen=True)
class Scale:
    """Where a case runs, and whether at tiny sizes."""

    device: torch.device
    quick: bool

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    @property
    def implementations(self) -> tuple[str, ...]:
        """Ours that are measured: those of a GPU, or on a CPU what runs there."""
        return ("triton", "cuda") if self.device.type == "cuda" else ("reference", "cpu")


def ours(
    scale: Scale, op: str, run: Callable[..., Any], check: Callable[[tuple, Any], float], tolerance: float
) -> Iterator[Way]:
    """A way for each implementation of ``op`` that exists: ``run(impl, *inputs)``."""
    reasons = report()[op]
    for name in scale.implementations:
        if name in reasons:
            yield Way(name, _bound(run, name), True, check, tolerance, reasons[name])


def compiled(scale: Scale, function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a plain expression; on a CPU, where compilation takes minutes, the expression itself."""
    if scale.device.type != "cuda":
        return function
    program: list[Callable[..., Any]] = []

    def run(*inputs: Any) -> Any:  # the compiler is imported when first needed
        if not program:
            program.append(torch.compile(function, dynamic=False))
        return program[0](*inputs)

    return run


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite for a NaN or another shape."""
    if found.shape != expected.shape:
        return inf
    found, expected = found.double(), expected.double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if isfinite(error) else inf


def sample_rows(n: int, at_most: int, device: torch.device) -> Tensor:
    """Row numbers spread evenly from the first to the last."""
    return torch.linspace(0, n - 1, min(n, at_most), dtype=torch.float64).round().long().to(device)


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal values. Drawn a slice at a time, so that no float32 copy of the whole exists."""
    tensor = torch.empty(shape, dtype=dtype, device=generator.device)
    for part in tensor.split(max(1, 2**28 // max(1, tensor[0].numel()))):
        part.copy_(torch.randn(part.shape, generator=generator, device=generator.device))
    return tensor


def _bound(run: Callable[..., Any], name: str) -> Callable[..., Any]:
    return lambda *inputs: run(name, *inputs)

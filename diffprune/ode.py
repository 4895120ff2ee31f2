"""An adaptive solver whose steps are each sample's own, so that a sample does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffprune.errors import DiffpruneError

RowVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [b, ...], t [b], rows [b] of the batch) -> [b, ...]
_Velocity = Callable[[Tensor, Tensor], Tensor]

MAX_TRIALS = 1_000
SMALLEST_STEP = 1e-8

# Dormand & Prince 1980, as in Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, table II.5.2.
_TIMES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # also the solution of order 5
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)  # order 5 less order 4


class Solution(NamedTuple):
    """What ``solve_adaptive`` returns."""

    x: Tensor  # [B, ...], at the end
    evaluations: Tensor  # [B] int64, of the velocity, per sample


def solve_adaptive(
    velocity: RowVelocity, x0: Tensor, *, rtol: float = 1e-3, atol: float = 1e-6, start: float = 0.0, end: float = 1.0
) -> Solution:
    """Solves dx/dt = velocity(x, t) from t=start to t=end by Dormand and Prince's pair of orders 5 and 4 (dopri5).

    Every sample has a time, a step size and an error of its own: the step of one is accepted or refused whatever its
    neighbours do, and a sample that has arrived leaves the batch. One step size for a whole batch, as torchdiffeq
    takes, would make each image depend on which others are drawn with it.

    Args:
        velocity: takes x [b, ...], t [b] (of x's dtype; the times differ) and the rows [b] int64 of x0 that these
            are, b <= B, and returns dx/dt [b, ...].
        x0: x at t=start, [B, ...].
        rtol, atol: a step is accepted if the root mean square over the sample's elements of
            error / (atol + rtol·max(|x before|, |x after|)) is at most 1. The defaults are those of SiT's sampler.
        start, end: times, 0 <= start < end <= 1.

    Returns: x at t=end and the evaluations that each sample took. A sample whose velocity is not finite is NaN.
    Raises: ValueError for times or tolerances out of range; DiffpruneError if a sample needs over 1,000 steps.
    """
    if not 0 <= start < end <= 1:
        raise ValueError(f"expected times 0 <= start < end <= 1, got {start} and {end}")
    if not (rtol >= 0 and atol > 0):
        raise ValueError(f"expected rtol >= 0 and atol > 0, got {rtol} and {atol}")
    result, evaluations = x0.clone(), torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    row = torch.arange(len(x0), device=x0.device)  # the samples on their way
    x, t = x0, torch.full((len(x0),), start, dtype=torch.float64, device=x0.device)
    slope = velocity(x, t.to(x.dtype), row)
    h = _first_step(partial(_of_rows, velocity, row), x, t, slope, rtol, atol, end)
    evaluations += 2
    for _ in range(MAX_TRIALS):
        if len(row) == 0:
            return Solution(result, evaluations)
        last = h >= end - t
        h = torch.where(last, end - t, h)
        new, new_slope, error = _try_step(partial(_of_rows, velocity, row), x, t, slope, h, rtol, atol)
        evaluations[row] += len(_STAGES)
        lost = ~error.isfinite() & (h < SMALLEST_STEP)  # no shorter step helps against NaN
        accepted = error <= 1
        # The usual controller: the error is of order h^5; at most 10 times longer, 5 times shorter.
        factor = (0.9 * error.clamp_min(1e-10) ** -0.2).clamp(0.2, 10.0)
        factor = torch.where(error.isfinite(), factor, factor.new_tensor(0.2))
        t, h = torch.where(accepted, t + h, t), h * factor
        x, slope = _where(accepted, new, x), _where(accepted, new_slope, slope)
        x = _where(lost, torch.full_like(x, torch.nan), x)
        done = (accepted & last) | lost
        result[row[done]] = x[done]
        stay = ~done
        row, x, t, h, slope = row[stay], x[stay], t[stay], h[stay], slope[stay]
    raise DiffpruneError(
        f"dopri5: {len(row)} of {len(x0)} samples have not arrived after {MAX_TRIALS:,} steps, the slowest is at "
        f"t = {float(t.min()):.4g}; take looser tolerances than rtol {rtol:g} and atol {atol:g}, or another method"
    )


def _of_rows(velocity: RowVelocity, row: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return velocity(x, t, row)


def _try_step(
    velocity: _Velocity, x: Tensor, t: Tensor, slope: Tensor, h: Tensor, rtol: float, atol: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of h [b] from x [b, ...]: the new x, its slope (the next step's first), and the error norm [b]."""
    slopes, new, wide = [slope], x, _wide(h, x)
    for time, weights in zip(_TIMES, _STAGES, strict=True):
        new = x + wide * _combine(weights, slopes)
        slopes.append(velocity(new, (t + time * h).to(x.dtype)))
    error = wide * _combine(_ERROR, slopes)
    return new, slopes[-1], _norm(error, atol + rtol * torch.maximum(x.abs(), new.abs()))


def _first_step(
    velocity: _Velocity, x: Tensor, t: Tensor, slope: Tensor, rtol: float, atol: float, end: float
) -> Tensor:
    """A step size [B] float64 for each sample: Hairer, Nørsett & Wanner, section II.4; one evaluation."""
    scale = atol + rtol * x.abs()
    size, speed = _norm(x, scale), _norm(slope, scale)
    h = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp(max=end - t)
    bend = _norm(velocity(x + _wide(h, x) * slope, (t + h).to(x.dtype)) - slope, scale) / h
    steepest = torch.maximum(speed, bend)
    other = torch.where(steepest <= 1e-15, (h * 1e-3).clamp_min(1e-6), (0.01 / steepest) ** (1 / 5))
    first = torch.minimum(100 * h, other)
    return torch.where(first.isfinite(), first, 1e-3)  # a NaN is told by the first step


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total = total.add(slope, alpha=weight)
    return total


def _norm(x: Tensor, scale: Tensor) -> Tensor:
    """Root mean square of x / scale over each sample: [B] float64."""
    return (x / scale).double().square().flatten(1).mean(dim=1).sqrt()


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] of ``like``'s dtype."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def _where(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)

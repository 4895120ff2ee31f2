"""The linear flow path between noise and data, its losses, and samplers of its ODE.

The convention is SiT's (arXiv 2401.08740, linear path): t=0 is noise x0, t=1 is data x1,

    xt = (1 - t)·x0 + t·x1,    velocity target = x1 - x0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

FIXED_STEP_METHODS = ("euler", "midpoint", "heun")

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x [B, ...], t [B]) -> velocity [B, ...]


def interpolate(x1: torch.Tensor, x0: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The point of the path at time t: xt = (1 - t)·x0 + t·x1.

    Args: x1 data [B, ...]; x0 noise, the same shape; t [B] in [0, 1].
    Returns: [B, ...]. Raises: ValueError where shapes do not fit.
    """
    _check_same_shape(x1, x0)
    if t.shape != x1.shape[:1]:
        raise ValueError(f"expected t of shape {tuple(x1.shape[:1])}, got {tuple(t.shape)}")
    t = t.view(-1, *[1] * (x1.dim() - 1))
    return (1 - t) * x0 + t * x1


def velocity_target(x1: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The velocity of the linear path, x1 - x0, the same at every t: [B, ...]."""
    _check_same_shape(x1, x0)
    return x1 - x0


def velocity_loss(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The flow matching loss of each sample, ℓ = mean((v - target)²) over its elements: [B]."""
    _check_same_shape(velocity, target)
    return (velocity - target).square().flatten(1).mean(dim=1)


def velocity_error_norm(velocity: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The error norm of each sample, ‖v - target‖₂ over its elements (EL2N, arXiv 2107.07075): [B]."""
    _check_same_shape(velocity, target)
    return torch.linalg.vector_norm((velocity - target).flatten(1), dim=1)


def sample_ode(
    velocity: Velocity,
    x0: torch.Tensor,
    steps: int,
    method: Literal["euler", "midpoint", "heun"] = "euler",
    *,
    start: float = 0.0,
    end: float = 1.0,
) -> torch.Tensor:
    """Solves dx/dt = velocity(x, t) from t=start (noise at 0) to t=end (data at 1) in `steps` equal intervals.

    Args:
        velocity: takes x [B, ...] and t [B] (of x's dtype) and returns dx/dt [B, ...].
        x0: x at t=start, [B, ...].
        steps: number of intervals, at least 1.
        method: one of ``FIXED_STEP_METHODS``: "euler" (order 1, `steps` evaluations), "midpoint" or "heun" (order 2,
            `2·steps` evaluations). ``ode.solve_adaptive`` chooses its steps itself.
        start, end: times, 0 <= start < end <= 1.

    Returns: x at t=end, [B, ...]. Raises: ValueError for fewer than 1 step, an unknown method, or other times.
    """
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    if method not in FIXED_STEP_METHODS:
        raise ValueError(f"expected method {', '.join(map(repr, FIXED_STEP_METHODS))}, got {method!r}")
    if not 0 <= start < end <= 1:
        raise ValueError(f"expected times 0 <= start < end <= 1, got {start} and {end}")
    x, h = x0, (end - start) / steps

    def slope_at(x: torch.Tensor, step: float) -> torch.Tensor:
        # One division: 7/10 and not 7·(1/10), and the end of the last interval is `end` itself.
        return velocity(x, x.new_full((len(x),), start + (end - start) * step / steps))

    for step in range(steps):
        slope = slope_at(x, step)
        if method == "heun":
            slope = (slope + slope_at(x + h * slope, step + 1)) / 2
        elif method == "midpoint":
            slope = slope_at(x + h / 2 * slope, step + 0.5)
        x = x + h * slope
    return x


def guided_velocity(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    labels: torch.Tensor | None,
    guidance_scale: float,
    null_label: int | None,
    channels: int | None = None,
) -> torch.Tensor:
    """Classifier-free guidance (arXiv 2207.12598): v = v_null + s·(v_label - v_null), on all channels.

    Args:
        model: called as model(x, t, labels) -> velocity.
        x: [B, ...]; t: [B]; labels: [B] int64, or None for a model without labels.
        guidance_scale: s. At 1 the model is evaluated once, without the null label; else once on 2B rows.
        null_label: the label that stands for "no label".
        channels: guide only this many, the first ones, and leave v_label in the others. The published DiT's sampler
            does so with 3 of 4, "for exact reproducibility" of its own figures; a VQ-VAE's channels are alike, so None
            (all) is right elsewhere.

    Returns: [B, ...]. Raises: ValueError where a scale other than 1 has no labels or no null label to guide with.
    """
    if guidance_scale == 1:
        return model(x, t, labels)
    if labels is None or null_label is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs labels and a null label: use 1 without them")
    both = torch.cat([labels, torch.full_like(labels, null_label)])
    with_label, without = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    guided = without + guidance_scale * (with_label - without)
    return guided if channels is None else torch.cat([guided[:, :channels], with_label[:, channels:]], dim=1)


def _check_same_shape(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")

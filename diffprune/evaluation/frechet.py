"""Fréchet distance between the Gaussians fitted to two sets of features, and what it would be with endless samples."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features
from diffprune.evaluation.gaussians import Gaussian

POINTS = 15


def frechet_distance(samples: Tensor | Gaussian, reference: Tensor | Gaussian) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    ``samples`` [N, D] and ``reference`` [M, D], N, M >= 2, or the ``Gaussian`` of either; covariances are unbiased
    (divided by N − 1). On the features of FID's Inception this is the FID. With fewer rows than dimensions on either
    side the covariance is singular and the distance is inflated: compare such numbers only at equal N and M.
    Raises InputError for other shapes and for NaN.
    """
    given = {"samples": samples, "reference": reference}
    check_features(2, power=4, **{name: x for name, x in given.items() if not isinstance(x, Gaussian)})
    return _Target(_gaussian(reference)).distance(_gaussian(samples))


def frechet_distance_infinity(
    samples: Tensor, reference: Tensor | Gaussian, *, points: int = POINTS, smallest: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """The Fréchet distance extrapolated to infinitely many samples (Chong & Forsyth 2020, arXiv 1911.07023, sec. 4).

    The distance of N samples is too large by an amount that falls as 1/N and that differs between generators, so that
    a finite N can rank two of them wrongly. The distance is computed for ``points`` random subsets of evenly spaced
    sizes from ``smallest`` (by default a tenth of the samples, as published, but more than D) to all of them; a
    straight line through them over 1/N meets 1/N = 0 at ``distance``. The reference stays as it is.

    Returns ``distance`` (may be below 0 by the noise of the fit), ``slope``, ``sizes`` and ``distances``.
    Raises InputError for other shapes, NaN, fewer than 2 points, or too few samples: with N < 2·(D + 1) the singular
    covariances do not follow the line.
    """
    check_features(2, power=4, samples=samples, **({} if isinstance(reference, Gaussian) else {"reference": reference}))
    count, dimensions = samples.shape
    smallest = max(count // 10, dimensions + 1) if smallest is None else smallest
    if points < 2 or not 2 <= smallest < count:
        raise InputError(
            f"expected at least 2 points and sizes from 2 to below the {count} samples, got {points} points from "
            f"{smallest}"
        )
    if count < 2 * (dimensions + 1):
        raise InputError(f"expected at least {2 * (dimensions + 1)} samples for {dimensions} dimensions, got {count}")
    target, generator = _Target(_gaussian(reference)), torch.Generator().manual_seed(seed)
    sizes = [smallest + round(i * (count - smallest) / (points - 1)) for i in range(points)]
    distances = []
    for size in sizes:
        rows = torch.randperm(count, generator=generator)[:size].sort().values
        distances.append(target.distance(Gaussian.of(samples[rows.to(samples.device)])))
    distance, slope = _line([1 / size for size in sizes], distances)
    return {"distance": distance, "slope": slope, "sizes": sizes, "distances": distances}


class _Target:
    """A Gaussian with the root of its covariance, to which distances are taken."""

    def __init__(self, gaussian: Gaussian) -> None:
        self.mean, self.covariance = gaussian.mean, gaussian.covariance
        eigenvalues, vectors = torch.linalg.eigh(self.covariance)
        self.root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T

    def distance(self, other: Gaussian) -> float:
        if other.mean.shape != self.mean.shape:
            raise InputError(f"expected features of one dimension, got {len(other.mean)} and {len(self.mean)}")
        covariance = other.covariance
        # Σ₁Σ₂ and √Σ₂·Σ₁·√Σ₂ have the same eigenvalues; the second is symmetric, so they come out real.
        product = self.root @ covariance @ self.root
        eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
        squared = (other.mean - self.mean).square().sum() + covariance.trace() + self.covariance.trace()
        return max(0.0, float(squared - 2 * eigenvalues.sqrt().sum()))


def _gaussian(features: Tensor | Gaussian) -> Gaussian:
    return features if isinstance(features, Gaussian) else Gaussian.of(features)


def _line(x: list[float], y: list[float]) -> tuple[float, float]:
    """Where the least-squares line through the points meets x = 0, and its slope.

    Summed exactly: the last digits of LAPACK's answer change with where its memory lies.
    """
    middle, height = math.fsum(x) / len(x), math.fsum(y) / len(y)
    spread = math.fsum((a - middle) ** 2 for a in x)
    slope = math.fsum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / spread
    return height - slope * middle, slope

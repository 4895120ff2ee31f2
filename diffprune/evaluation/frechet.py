"""Fréchet distance between the Gaussians fitted to two sets of features."""

from __future__ import annotations

import torch

from diffprune.evaluation.features import check_features

_ROWS = 8192


def frechet_distance(samples: torch.Tensor, reference: torch.Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), in float64 (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    ``samples`` [N, D] and ``reference`` [M, D], N, M >= 2; covariances are unbiased (divided by N − 1). With fewer
    rows than dimensions on either side the covariance is singular and the distance is inflated: compare such numbers
    only at equal N and M. Raises InputError for other shapes and for NaN.
    """
    check_features(2, samples=samples, reference=reference)
    mean1, covariance1 = gaussian(samples)
    mean2, covariance2 = gaussian(reference)
    root = _symmetric_root(covariance1)
    # Σ₁Σ₂ and √Σ₁·Σ₂·√Σ₁ have the same eigenvalues; the second is symmetric, so they come out real.
    product = root @ covariance2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    squared = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace()
    return max(0.0, float(squared - 2 * eigenvalues.sqrt().sum()))


def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and unbiased covariance [D, D] of features [N, D], in float64 without a float64 copy of them."""
    mean = features.mean(dim=0, dtype=torch.float64)
    scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for rows in features.split(_ROWS):
        centred = rows.double() - mean
        scatter.addmm_(centred.T, centred)
    return mean, scatter / (len(features) - 1)


def _symmetric_root(matrix: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T

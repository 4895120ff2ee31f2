"""Vendi score: the effective number of different images in a set."""

from __future__ import annotations

import math

import torch

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features


def vendi_score(embeddings: torch.Tensor, q: float = 1) -> float:
    """exp of the Rényi entropy of order ``q`` of the eigenvalues of K/N, K the cosine kernel, in float64.

    Between 1 (all images alike) and N (all orthogonal). ``q`` = 1 is the Vendi score (Friedman and Dieng 2022,
    arXiv 2210.02410, definition 3.1); other orders from 0 to ``math.inf`` are Pasarkar and Dieng's (2023,
    arXiv 2310.12952, eq. 2): low orders count rare images more. ``embeddings`` [N, D] need not be normalised. The
    D×D dual, which has the same eigenvalues, is used when N > D. Raises InputError for NaN, other shapes, a zero
    embedding or a negative ``q``.
    """
    check_features(1, embeddings=embeddings)
    if not q >= 0:
        raise InputError(f"vendi_score: expected an order q >= 0, got {q}")
    norms = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True, dtype=torch.float64)
    if (norms == 0).any():
        raise InputError(f"embeddings: row {int(norms[:, 0].argmin())} is zero: it has no cosine")
    n, dim = embeddings.shape
    if n > dim:
        kernel = torch.zeros(dim, dim, dtype=torch.float64, device=embeddings.device)
        for rows, row_norms in zip(embeddings.split(8192), norms.split(8192), strict=True):
            unit = rows.double() / row_norms
            kernel.addmm_(unit.T, unit)
    else:
        unit = embeddings.double() / norms
        kernel = unit @ unit.T
    eigenvalues = torch.linalg.eigvalsh(kernel / n)
    # Rounding leaves null eigenvalues of about eps, which low orders would count as images.
    null = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues.max())
    weights = eigenvalues[eigenvalues > null]
    if q == 1:
        return float(torch.exp(-(weights * weights.log()).sum()))
    if q == math.inf:
        return float(1 / weights.max())
    return float(weights.pow(q).sum().pow(1 / (1 - q)))

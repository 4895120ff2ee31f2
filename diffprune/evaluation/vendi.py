"""Vendi score: the effective number of different images in a set."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features, expect_tensor

_ROWS = 8192


def vendi_score(embeddings: Tensor, q: float = 1) -> float:
    """exp of the Rényi entropy of order ``q`` of the eigenvalues of K/N, K the cosine kernel, in float64.

    Between 1 (all images alike) and N (all orthogonal). ``q`` = 1 is the Vendi score (Friedman and Dieng 2022,
    arXiv 2210.02410, definition 3.1); other orders from 0 to ``math.inf`` are Pasarkar and Dieng's (2023,
    arXiv 2310.12952, eq. 2): low orders count rare images more. ``embeddings`` [N, D] need not be normalised. The
    D×D dual, which has the same eigenvalues, is used when N > D. Raises InputError for NaN, other shapes, a zero
    embedding or a negative ``q``.
    """
    return vendi_scores(embeddings, [q])[0]


def vendi_scores(embeddings: Tensor | Iterable[Tensor], orders: Sequence[float]) -> list[float]:
    """``vendi_score`` for each order, from one decomposition.

    ``embeddings``: [N, D], or blocks of it [n, D], which are never held together: the dual is folded block by block.
    """
    for q in orders:
        if not q >= 0:
            raise InputError(f"vendi_score: expected an order q >= 0, got {q}")
    eigenvalues = _eigenvalues(embeddings)
    # Rounding leaves null eigenvalues of about eps, which low orders would count as images.
    null = len(eigenvalues) * torch.finfo(torch.float64).eps * float(eigenvalues.max())
    weights = eigenvalues[eigenvalues > null]
    return [_effective_number(weights, q) for q in orders]


def _effective_number(weights: Tensor, q: float) -> float:
    if q == 1:
        return float(torch.exp(-(weights * weights.log()).sum()))
    if q == math.inf:
        return float(1 / weights.max())
    # weights^q underflow for large q; (w/max)^q do not
    largest = weights.max()
    total = (weights / largest).pow(q).sum().log() + q * largest.log()
    return float(torch.exp(total / (1 - q)))


def _eigenvalues(embeddings: Tensor | Iterable[Tensor]) -> Tensor:
    if isinstance(embeddings, Tensor):
        check_features(1, embeddings=embeddings)
        if embeddings.shape[0] <= embeddings.shape[1]:
            unit = _unit_rows(embeddings, 0)
            return torch.linalg.eigvalsh(unit @ unit.T / len(unit))
        embeddings = [embeddings]
    dual, count = None, 0
    for block in embeddings:
        expect_tensor("embeddings", block)
        if dual is None:
            dual = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64, device=block.device)
        for rows in block.split(_ROWS):
            unit = _unit_rows(rows, count)
            dual.addmm_(unit.T, unit)
            count += len(rows)
    if not count:
        raise InputError("embeddings: expected at least 1 row, got 0")
    return torch.linalg.eigvalsh(dual / count)


def _unit_rows(rows: Tensor, start: int) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    if (norms == 0).any():
        raise InputError(f"embeddings: row {start + int(norms[:, 0].argmin())} is zero: it has no cosine")
    return rows.double() / norms

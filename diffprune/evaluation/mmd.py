"""Kernel distance: maximum mean discrepancy between two sets of features, KID on those of FID's Inception."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features

BLOCKS = 100
BLOCK_SIZE = 1000


def kernel_distance(
    samples: Tensor, reference: Tensor, *, blocks: int = BLOCKS, block_size: int = BLOCK_SIZE, seed: int = 0
) -> dict[str, float]:
    """Squared MMD with the kernel (⟨x, y⟩/D + 1)³, unbiased (Bińkowski et al. 2018, arXiv 1801.01401, sec. 4).

    Unlike the Fréchet distance it does not depend on the number of samples on average, and may be below 0. It is the
    mean over ``blocks`` blocks, each of ``block_size`` rows of ``samples`` [N, D] and of ``reference`` [M, D], drawn
    without repetition within a block by ``seed``; no more than N or M rows, and one block if that is all of both.

    Returns ``mean``, ``std`` (over blocks, dividing by their number, as torch-fidelity does; 0 for one block),
    ``blocks`` and ``block_size``. In float64. Raises InputError for other shapes, NaN or fewer than 2 rows.
    """
    check_features(2, samples=samples, reference=reference)
    if blocks < 1 or block_size < 2:
        raise InputError(f"expected blocks >= 1 and block_size >= 2, got {blocks} and {block_size}")
    block_size = min(block_size, len(samples), len(reference))
    if block_size == len(samples) == len(reference):
        blocks = 1
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(blocks, dtype=torch.float64)
    for i in range(blocks):
        x, y = (rows[_draw(len(rows), block_size, generator).to(rows.device)].double() for rows in (samples, reference))
        values[i] = _unbiased_mmd(x, y)
    return {
        "mean": float(values.mean()),
        "std": float(values.std(correction=0)),
        "blocks": blocks,
        "block_size": block_size,
    }


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:size]


def _unbiased_mmd(x: Tensor, y: Tensor) -> float:
    """Eq. 4 of the paper, for x and y [n, D] float64."""
    n = len(x)
    within = sum(float(_kernel(rows, rows).fill_diagonal_(0).sum()) for rows in (x, y))
    return within / (n * (n - 1)) - 2 * float(_kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T).div_(x.shape[1]).add_(1).pow_(3)

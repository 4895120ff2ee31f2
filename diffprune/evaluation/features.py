"""What every metric asks of its feature tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffprune.errors import InputError

TILE_BYTES = 64 << 20


def check_features(least: int, **features: torch.Tensor) -> None:
    """Raise InputError unless each tensor is a finite float [N, D] with N >= ``least``, all with the same D."""
    widths = {}
    for name, x in features.items():
        if x.dim() != 2 or not x.is_floating_point() or x.shape[1] == 0:
            raise InputError(f"{name}: expected a floating-point tensor [N, D], got {x.dtype} {tuple(x.shape)}")
        if x.shape[0] < least:
            raise InputError(f"{name}: expected at least {least} rows, got {x.shape[0]}")
        finite = x.isfinite().all(dim=1)
        if not finite.all():
            raise InputError(f"{name}: row {int(finite.int().argmin())} has NaN or infinite values")
        widths[name] = x.shape[1]
    if len(set(widths.values())) > 1:
        raise InputError(f"expected features of one dimension, got {widths}")


def squared_distance_tiles(
    queries: torch.Tensor,  # [N, D]
    points: torch.Tensor,  # [M, D]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, squared Euclidean distances [rows, M] float64) over all queries, at most 64 MiB at a time.

    ‖q‖² + ‖p‖² − 2⟨q, p⟩ in float64 is exact for L2-normalised float16 values (every product is a multiple of 2⁻⁴⁸
    and every sum is below 4), so that duplicates are at distance zero and ties are ties.
    """
    points = points.double()
    norms = points.square().sum(dim=1)
    rows = max(1, TILE_BYTES // (8 * max(len(points), 1)))
    for start in range(0, len(queries), rows):
        tile = queries[start : start + rows].double()
        squared = torch.addmm(norms[None, :] + tile.square().sum(dim=1)[:, None], tile, points.T, alpha=-2)
        yield slice(start, start + len(tile)), squared.clamp_min_(0)

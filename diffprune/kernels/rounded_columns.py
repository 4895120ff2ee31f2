"""Columns, such as centroids, rounded for a nearest-neighbour search by products of known error, in plain torch.

‖x − c‖² is the smaller, the larger v = (x − μ)·C − ‖C‖²/2 with C = c − μ is, for any centre μ. Tensor cores find v from
rounded values; here is what bounds how far off it may be. All norms and v are in units of a power of two that brings
the largest entry of a C next to 2^14.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**24
"""Elements of the columns that are held in float64 at a time: 128 MiB."""


def centre_of(columns: Tensor) -> Tensor:
    """[D] float32: the median of a sample of ``columns`` [M, D], which no outlier moves."""
    sample = columns[:: max(1, len(columns) // 256)].float()
    return sample.sort(dim=0).values[len(sample) // 2].contiguous()  # median() is not deterministic on a GPU


def round_columns(
    columns: Tensor, centre: Tensor, rounded: Tensor, *, whole: bool, neighbours: int = 1
) -> tuple[Tensor, Tensor]:
    """Writes Ĉ to ``rounded`` [M, D] float16 or int8 (multiples of a step), all of it; waits for no result.

    Returns the offset [M] float32, v = x̂·Ĉ − offset, and limits [6] float32: how many units are 1, the norm ‖C‖ of the
    ``neighbours``-th smallest, of the largest, max ‖C − Ĉ‖/‖C‖, ‖μ‖ if the rows keep it, the step. Norms and the
    ratio are rounded up.

    ``whole``: the rows keep the centre, and the offset makes up for it: x·Ĉ = (x − μ)·Ĉ + μ·Ĉ. By Ĉ and not by C, so
    that C − Ĉ is multiplied by x − μ alone, which for embeddings with a common direction is much shorter than x.
    """
    (m, depth), middle = columns.shape, centre.double()
    # Each operation is a launch on a GPU, longer than it works: mixed dtypes are converted by the operation itself.
    extremes = torch.stack(columns.aminmax(dim=0))
    largest = torch.linalg.vector_norm(extremes - middle, ord=torch.inf).clamp(min=2.0**-100)
    per_unit = torch.frexp(largest).mantissa * 2**14 / largest  # a power of two
    origin, integers = middle * per_unit, rounded.dtype == torch.int8
    step = torch.ceil(largest * per_unit / 127) if integers else torch.ones_like(largest)
    norm, error, shift = torch.empty(3, m, dtype=torch.float64, device=columns.device)
    height = max(1, BLOCK // depth)
    for start in range(0, m, height):
        own = slice(start, start + height)
        exact = (columns[own] - middle) * per_unit
        rounded[own] = (exact / step).round() if integers else exact
        multiplied = rounded[own] * step if integers else rounded[own]
        torch.linalg.vector_norm(exact, dim=1, out=norm[own])
        torch.linalg.vector_norm(exact - multiplied, dim=1, out=error[own])
        if whole:
            torch.mv(multiplied.double(), origin, out=shift[own])
    offset = norm.square() / 2
    if whole:
        offset += shift
    ratio = (error / (norm + 2.0**-14 * depth**0.5)).amax()
    kept = torch.linalg.vector_norm(origin) if whole else torch.zeros_like(ratio)
    smallest, longest = norm.aminmax()
    if neighbours > 1:
        smallest = norm.topk(min(neighbours, m), largest=False).values.amax()
    limits = torch.stack([per_unit, smallest, longest, ratio, kept, step])
    limits[1:5] *= 1 + 2**-20  # not below after rounding
    return offset.float(), limits.float()

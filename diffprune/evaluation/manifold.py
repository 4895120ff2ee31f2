"""Precision, recall, density and coverage: do samples fall where real images are, and the other way round?"""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.evaluation.features import check_features
from diffprune.evaluation.neighbours import kth_squared
from diffprune.kernels.cpu.search import pair_sqdistances
from diffprune.kernels.magnitudes import largest_magnitude

TILE = 1 << 21
"""Pairs per tile: 8 MiB of float32 distances."""

MODERATE = 2.0**-48, 2.0**48
"""Where the largest of some float32 values lies, float32 has the squares of their norms."""


def precision_recall(samples: Tensor, reference: Tensor, k: int = 3) -> dict[str, float]:
    """How two sets of features [N, D] and [M, D] cover each other; N, M > ``k``.

    A set's manifold is the union of closed balls around its points, each reaching to the point's ``k``-th nearest
    neighbour in the same set (itself left out).

    - ``precision``: share of samples inside the reference's manifold; ``recall``: share of reference points inside
      the samples' (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2). ``f_score``: their harmonic mean.
    - ``density``: reference balls around a sample, on average, divided by k (may exceed 1); ``coverage``: share of
      reference balls with a sample in them (Naeem et al. 2020, arXiv 2002.09797, eq. 4-5).

    Exact: a matrix product in the features' precision (float64 where float32 cannot square them) decides the pairs that
    are farther from the edge of a ball than its rounding can reach, float64 the others. 2·D·(N² + M² + N·M) operations,
    a tile of distances at a time, never N×M. Recall falls with fewer samples: compare at equal counts.
    Raises InputError for other shapes, NaN, or too few points.
    """
    if k < 1:
        raise InputError(f"precision_recall: expected k >= 1, got {k}")
    check_features(k + 1, samples=samples, reference=reference)
    found = _Membership(samples, reference, kth_squared(samples, k), kth_squared(reference, k))
    precision = float((found.balls > 0).double().mean())
    recall = float(found.recalled.double().mean())
    return {
        "precision": precision,
        "recall": recall,
        "f_score": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "density": float(found.balls.double().mean()) / k,
        "coverage": float(found.covered.double().mean()),
    }


class _Membership:
    """One pass over all pairs (sample, reference point).

    ``balls`` [N] int64: in how many balls of the reference each sample lies; ``covered`` [M] bool: whether a reference
    ball holds a sample; ``recalled`` [M] bool: whether a reference point lies in a sample's ball.
    """

    def __init__(self, samples: Tensor, reference: Tensor, sample_radii: Tensor, reference_radii: Tensor) -> None:
        self.samples, self.reference = samples, reference
        self.sample_radii, self.reference_radii = sample_radii, reference_radii  # squared, float64
        device = samples.device
        self.balls = torch.zeros(len(samples), dtype=torch.int64, device=device)
        self.covered = torch.zeros(len(reference), dtype=torch.bool, device=device)
        self.recalled = torch.zeros(len(reference), dtype=torch.bool, device=device)
        dtype = torch.promote_types(torch.promote_types(samples.dtype, reference.dtype), torch.float32)
        if not MODERATE[0] <= largest_magnitude(samples, reference) <= MODERATE[1]:
            dtype = torch.float64
        centre = reference.mean(dim=0, dtype=torch.float64).to(dtype)  # small norms make small rounding errors
        y = reference.to(dtype) - centre
        y_squares = y.double().square().sum(dim=1)
        # |computed − exact| squared distance <= relative·(‖x‖ + ‖y‖)² <= 2·relative·(‖x‖² + ‖y‖²): the D additions of
        # a product and of the squares, the centring, the sums (Higham 2002, section 3.1), and the comparisons below.
        relative = 1.01 * (samples.shape[1] + 24) * torch.finfo(dtype).eps / 2
        backend = torch.backends.cuda if samples.is_cuda else torch.backends.mkldnn
        if dtype == torch.float32 and backend.matmul.fp32_precision in ("tf32", "bf16"):
            relative += 2**-6  # operands rounded to 8 bits
        slack = torch.finfo(dtype).tiny * samples.shape[1]
        rows = max(1, TILE // len(reference))
        for start in range(0, len(samples), rows):
            x = samples[start : start + rows].to(dtype) - centre
            x_squares = x.double().square().sum(dim=1)
            squared = torch.addmm(y_squares.to(dtype), x, y.T, alpha=-2).add_(x_squares.to(dtype)[:, None])
            error = 2 * relative * x_squares + slack, 2 * relative * y_squares
            self._balls_of_reference(start, squared, *error)
            self._balls_of_samples(start, squared, *error)

    def _balls_of_reference(self, start: int, squared: Tensor, row_error: Tensor, column_error: Tensor) -> None:
        radii = self.reference_radii
        sure, row, column = _split(squared, row_error[:, None], radii, column_error)
        row = row + start
        inside = self._exactly(row, column) <= radii[column]
        self.balls[start : start + len(squared)] += sure.sum(dim=1)
        self.balls.index_add_(0, row, inside.long())
        self.covered |= sure.any(dim=0)
        self.covered[column[inside]] = True

    def _balls_of_samples(self, start: int, squared: Tensor, row_error: Tensor, column_error: Tensor) -> None:
        radii = self.sample_radii[start : start + len(squared), None]
        sure, row, column = _split(squared, column_error, radii, row_error[:, None])
        undecided = ~(self.recalled[column])
        row, column = row[undecided] + start, column[undecided]
        inside = self._exactly(row, column) <= self.sample_radii[row]
        self.recalled |= sure.any(dim=0)
        self.recalled[column[inside]] = True

    def _exactly(self, row: Tensor, column: Tensor) -> Tensor:
        return pair_sqdistances(self.samples, self.reference, row, column)


def _split(squared: Tensor, other: Tensor, radius: Tensor, error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of a tile certainly lie in a ball [b, M] bool, and rows and columns of those in doubt.

    ``radius`` (squared) and ``error`` are the balls', along one axis of the tile; ``other`` is the error that goes
    with the other axis; all float64.
    """
    dtype = squared.dtype
    rounding = 4 * torch.finfo(dtype).eps * (radius + error)  # of the two edges to ``dtype``
    other = other.to(dtype)
    sure = squared + other <= (radius - error - rounding).to(dtype)
    # NaN, where a norm overflows, is in doubt.
    doubt = ~(squared - other > (radius + error + rounding).to(dtype)) & ~sure
    row, column = doubt.nonzero().unbind(dim=1)
    return sure, row, column

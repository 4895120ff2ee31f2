"""Exact nearest neighbours from a matrix product: what ``kmeans_assign`` and ``pairwise_topk`` share.

‖x − c‖² = ‖x‖² + v with v = ‖c‖² − 2 x·c, and one matrix product gives v for a block of pairs. In floating point v is
off by up to E (``error_bound``), so the columns with v <= (k-th smallest v) + 2E certainly hold the k nearest; these
few are then compared in float64 by their differences.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**21
"""Elements of the largest temporary: 8 MiB in float32."""


class Search:
    """Queries against one set of points: centred products and their error bound."""

    def __init__(self, points: Tensor, dtype: torch.dtype, k: int) -> None:
        """``points`` [M, D] are finite; work in ``dtype``; the ``k`` nearest are wanted."""
        self.points, self.dtype = points, dtype
        self.centre = centre_of(points, dtype)
        rows = max(1, BLOCK // points.shape[1])
        squares = [self.centred(block).double().square().sum(dim=1) for block in points.split(rows)]
        self.sqnorms = torch.cat(squares).to(dtype)  # [M]
        norms = self.sqnorms.sqrt()
        self.largest_norm, self.kth_norm = norms.max(), norms.kthvalue(k).values

    def centred(self, block: Tensor) -> Tensor:
        """Rows in the working dtype, less the centre."""
        return block.to(self.dtype) - self.centre

    def queries(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Centred queries [b, D] and the error bound [b, 1] of their products."""
        x = self.centred(block)
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        if not bool(norms.isfinite().all()):
            # NaN compares with nothing, so every column would be a candidate of such a row. Finite rows whose norm
            # overflows need just that.
            lost = ~block.isfinite().all(dim=1, keepdim=True)
            x, norms = x.masked_fill(lost, 0), norms.masked_fill(lost, 0)
        return x, self.error_bound(norms)

    def error_bound(self, norms: Tensor) -> Tensor:
        """Bound E [b, 1] of |computed v − exact v|, for queries of these centred ``norms`` and the columns that matter.

        With unit roundoff u, ‖x‖ and R the norms after centring: the D+1 additions of a product in any order, the
        rounding of x − centre and c − centre and that of ‖c‖² err by at most (D + 8)·u·(2‖x‖R + R²) (Higham, Accuracy
        and Stability of Numerical Algorithms, 2002, section 3.1); 1.01 pays for second order terms. The k nearest have
        a norm of at most R = 2‖x‖ + (k-th smallest norm), and for larger ones v grows faster than its error, so a far
        outlier does not loosen the bound.
        """
        dimensions = self.points.shape[1]
        numbers = torch.finfo(self.dtype)
        relative = 1.01 * (dimensions + 8) * numbers.eps / 2
        backend = torch.backends.cuda if self.points.is_cuda else torch.backends.mkldnn
        if self.dtype == torch.float32 and backend.matmul.fp32_precision in ("tf32", "bf16"):
            relative += 2**-6  # operands rounded to 8 bits: two errors of 2^-8 each, and as much to spare
        reach = torch.minimum(2 * norms + self.kth_norm, self.largest_norm)
        return relative * (2 * norms * reach + reach.square()) + (dimensions + 8) * numbers.tiny


def centre_of(points: Tensor, dtype: torch.dtype) -> Tensor:
    """[D], in the middle of finite ``points`` [M, D].

    Any centre is right. One in the middle keeps the norms and with them the error bound small, and no outlier moves a
    median. On the CPU one thread finds it: OpenMP's would spin on the cores that the search needs next.
    """
    sample = points[:: max(1, points.shape[0] // 64)].to(dtype)
    if sample.device.type != "cpu":
        return sample.median(dim=0).values
    middle = (len(sample) - 1) // 2
    return torch.from_numpy(np.partition(sample.numpy(), middle, axis=0)[middle].copy())


def pair_sqdistances(queries: Tensor, points: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """[P] float64: Σ(x − c)² of the pairs ``queries[row]``, ``points[column]``."""
    size = max(1, BLOCK // points.shape[1])
    blocks = [
        (queries[r].double() - points[c].double()).square_().sum(dim=1)
        for r, c in zip(row.split(size), column.split(size), strict=True)
    ]
    return torch.cat(blocks)


def smallest_per_row(row: Tensor, value: Tensor, k: int) -> Tensor:
    """Where the ``k`` smallest values of each row are, rows ascending, then values; ties stay in the order given."""
    order = value.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    row = row[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    return order[rank < k]

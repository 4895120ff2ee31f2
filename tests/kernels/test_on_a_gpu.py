"""What only a GPU shows: streams, and CuPy's arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffprune.kernels import kmeans_assign

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IMPLS = ("reference", "triton", "cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_on_the_current_stream(impl: str) -> None:
    """Behind what is queued there: the points are there only after a tenth of a second."""
    points = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).half().to("cuda")
    centroids = points[:50].float()
    expected, _ = kmeans_assign(points, centroids, impl=impl)  # compiles
    late, stream = torch.zeros_like(points), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(points)
        found, _ = kmeans_assign(late, centroids, impl=impl, check_values=False)
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_cupy(impl: str) -> None:
    """On a stream of its own, which waits for PyTorch's, and PyTorch's for it."""
    cupy = pytest.importorskip("cupy")
    points = np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32)
    expected, _ = kmeans_assign(points, points[:50])
    with cupy.cuda.Stream(non_blocking=True):
        given = cupy.asarray(points)
        found, sqdistance = kmeans_assign(given, given[:50], impl=impl)
        assert type(found) is type(sqdistance) is cupy.ndarray
        np.testing.assert_array_equal(cupy.asnumpy(found), expected)

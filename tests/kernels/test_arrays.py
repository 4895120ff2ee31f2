"""Every public op takes NumPy and CuPy arrays as well as tensors, and answers in kind."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from op_cases import OPS, OTHERS, arguments, run

from diffprune import kernels
from diffprune.kernels import kmeans_assign, pairwise_topk


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for CuPy, in CPU memory: what ``arrays`` uses of it, and nothing else of NumPy."""
    module = ModuleType("cupy")

    class ndarray:
        def __init__(self, array: np.ndarray) -> None:
            self.array = array
            self.strides, self.itemsize, self.dtype = array.strides, array.itemsize, array.dtype
            self.flags = SimpleNamespace(c_contiguous=array.flags.c_contiguous)

        def astype(self, dtype: np.dtype, order: str = "K") -> ndarray:
            return ndarray(self.array.astype(dtype, order=order))

        def __dlpack__(self, **options: Any) -> object:
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.array.__dlpack_device__()

    module.ndarray = ndarray
    module.from_dlpack = lambda tensor: ndarray(np.from_dlpack(tensor))
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def numpy_arguments(op: str) -> dict[str, Any]:
    return {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in arguments(op).items()}


def test_all_public_ops_are_here() -> None:
    assert set(OPS) | {"report"} == set(kernels.__all__)


@pytest.mark.parametrize("op", OPS)
def test_numpy(op: str) -> None:
    for found, expected in zip(run(op, numpy_arguments(op)), run(op, arguments(op)), strict=True):
        assert type(found) is np.ndarray and found.flags.writeable
        assert found.dtype == expected.numpy().dtype
        np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("op", OPS)
def test_cupy(op: str, cupy: ModuleType) -> None:
    given = {k: cupy.ndarray(v) if isinstance(v, np.ndarray) else v for k, v in numpy_arguments(op).items()}
    for found, expected in zip(run(op, given), run(op, arguments(op)), strict=True):
        assert type(found) is cupy.ndarray
        np.testing.assert_array_equal(found.array, expected.numpy())


@pytest.mark.parametrize("op", OPS)
def test_positional(op: str) -> None:
    given = numpy_arguments(op)
    order = getattr(kernels, op).__wrapped__.__code__.co_varnames
    in_order = [given[name] for name in order if name in given]
    found = getattr(kernels, op)(*in_order, impl="reference")
    first = found[0] if isinstance(found, tuple) else found
    np.testing.assert_array_equal(first, run(op, given | {"impl": "reference"})[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(x, 3, axis=1)[:, ::3],
        lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        lambda x: x.astype(">f4"),
        lambda x: np.frombuffer(b"-" + x.tobytes(), dtype="u1")[1:].view("f4").reshape(x.shape),
        lambda x: in_records(x),
    ],
    ids=["rows backwards", "fortran", "strided", "columns backwards", "big-endian", "odd address", "records"],
)
def test_any_memory(change) -> None:
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).numpy()
    changed = change(points)
    np.testing.assert_array_equal(changed, points)
    for found, expected in zip(kmeans_assign(changed, points[:3]), kmeans_assign(points, points[:3]), strict=True):
        np.testing.assert_array_equal(found, expected)


def in_records(x: np.ndarray) -> np.ndarray:
    """Rows that are an odd number of bytes apart."""
    records = np.zeros(len(x), dtype=[("row", x.dtype, x.shape[1:]), ("byte", "u1")])
    records["row"] = x
    return records["row"]


def test_cupy_backwards(cupy: ModuleType) -> None:
    points = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).numpy()
    found, _ = kmeans_assign(cupy.ndarray(np.ascontiguousarray(points[::-1])[::-1]), cupy.ndarray(points[:3]))
    np.testing.assert_array_equal(found.array, kmeans_assign(points, points[:3])[0])


def test_read_only_memory_is_read_where_it_is(tmp_path, monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    """Embeddings come as memory-mapped files: no copy, no warning."""
    np.save(tmp_path / "points.npy", np.arange(12, dtype=np.float16).reshape(6, 2))
    points = np.load(tmp_path / "points.npy", mmap_mode="r")
    seen = []
    op = sys.modules["diffprune.kernels.kmeans_assign"]
    monkeypatch.setattr(op, "_op", lambda x, y, *_: seen.append(x.data_ptr()) or (x, y))
    kmeans_assign(points, points)
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        assert seen == [points.ctypes.data]
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_numpy_scalars_for_numbers() -> None:
    points = torch.randn(9, 3).numpy()
    plain = pairwise_topk(points, points, 2, True)
    for found, expected in zip(pairwise_topk(points, points, np.int64(2), np.True_ + 0), plain, strict=True):
        np.testing.assert_array_equal(found, expected)
    tensors = pairwise_topk(torch.from_numpy(points), torch.from_numpy(points), np.int64(2), True)
    assert isinstance(tensors[0], torch.Tensor)


@pytest.mark.parametrize(
    ("points", "centroids", "message"),
    [
        (np.ones((3, 2)), torch.ones(2, 2), "expected arrays of one kind, got points of numpy, centroids of torch"),
        (torch.ones(3, 2), np.ones((2, 2)), "expected arrays of one kind, got points of torch, centroids of numpy"),
        ([[1.0, 2.0]], torch.ones(2, 2), "expected points as a torch, NumPy or CuPy array, got list"),
        (torch.ones(3, 2), None, "expected centroids as a torch, NumPy or CuPy array, got NoneType"),
        (np.float32(3), np.ones((2, 2)), "expected points as a torch, NumPy or CuPy array, got float32"),
        (np.array([["a", "b"]]), np.ones((2, 2)), "expected points of a dtype that torch has, got <U1"),
        (np.array([[None, 1]]), np.ones((2, 2)), "expected points of a dtype that torch has, got object"),
        (np.ones((3, 2), np.longdouble), np.ones((2, 2)), "expected points of a dtype that torch has, got float128"),
        (np.ones((3, 2), np.int32), np.ones((2, 2)), "expected points of dtype float16 or .*, got torch.int32"),
        (np.ma.masked_array(np.ones((3, 2)), mask=True), np.ones((2, 2)), "without a mask, got MaskedArray"),
        (np.ones(3), np.ones((2, 2)), r"expected points \[N, D\], got \(3,\)"),
    ],
)
def test_bad_arrays(points: Any, centroids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans_assign(points, centroids)


def test_mixed_with_cupy(cupy: ModuleType) -> None:
    with pytest.raises(ValueError, match="got points of cupy, centroids of numpy"):
        kmeans_assign(cupy.ndarray(np.ones((3, 2))), np.ones((2, 2)))


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op: str) -> None:
    torch.compiler.reset()
    function, others = getattr(kernels, op), OTHERS.get(op, {})
    tensors = {name: value for name, value in arguments(op).items() if name not in others}
    compiled = torch.compile(lambda given: function(**given, **others), backend="aot_eager", fullgraph=True)
    found, expected = compiled(tensors), function(**tensors, **others)
    for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_ops_are_compiled_apart() -> None:
    """Dynamo gives up on a function that it compiled 8 times: the ops must not be one function to it."""
    points = torch.randn(6, 4)
    assert len({getattr(kernels, op).__code__ for op in OPS}) == len(OPS)
    assert kmeans_assign.__code__.co_name == "kmeans_assign"
    assert torch.compile(pairwise_topk, backend="eager", fullgraph=True)(points, points, 2)[0].shape == (6, 2)


def test_imports_torch_alone() -> None:
    """Neither NumPy's, CuPy's nor Triton's module is imported for those who pass tensors."""
    code = (
        "import sys, torch; before = set(sys.modules); import diffprune.kernels\n"
        "print({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "{'diffprune'}\n"

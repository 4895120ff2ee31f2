"""Rows for k-means, wherever they are: a tensor, a NumPy or CuPy array, or ``.npy`` files larger than memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffprune.errors import InputError
from diffprune.kernels.checks import FLOATING
from diffprune.rank_talk import ALONE, RankTalk
from diffprune.row_files import RowFile, read_rows

DEFAULT_MEMORY = 2**30
"""Bytes of rows held at a time when nothing else is said: two blocks of half of it."""

SHOWN = 10


def open_points(points: Any, *, metric: str, memory: int | None = None, name: str = "points") -> Points:
    """``points`` as k-means reads them.

    A torch tensor, a NumPy array or anything with DLPack is [N, D] in memory. A ``numpy.memmap``, or a list of arrays
    and paths of ``.npy`` files, each [n, D], is read by blocks of at most ``memory`` bytes, and held whole if it fits.
    Raises InputError for another kind, rank or dtype.
    """
    if isinstance(points, (np.memmap, str, os.PathLike)):
        points = [points]
    if isinstance(points, (list, tuple)):
        parts = [_open_part(name, part) for part in points]
        streamed = StreamedPoints(parts, metric, memory or DEFAULT_MEMORY)
        return streamed if streamed.bytes > streamed.memory else streamed.held()
    return HeldPoints(_checked(name, as_tensor(name, points)), metric, points)


@dataclass(frozen=True)
class Part:
    """Rows of one array [n, D]: all of them, or those in ``rows``, ascending."""

    array: np.ndarray | RowFile
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def read_into(self, target: np.ndarray, start: int) -> None:
        """Copy the rows from ``start`` on; a file is read past its mapping, so that no page of it stays in memory."""
        stop = start + len(target)
        if self.rows is None:
            _read(self.array, start, target)
        else:
            rows = self.rows[start:stop]
            block = np.empty((rows[-1] + 1 - rows[0], self.array.shape[1]), self.array.dtype)
            _read(self.array, rows[0], block)
            target[:] = block[rows - rows[0]]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Single rows, by their number among these."""
        return self.array[rows if self.rows is None else self.rows[rows]]


class Points:
    """N rows of D, by blocks. ``blocks`` and ``take`` give them as k-means sees them: see ``prepare``."""

    rows: int
    dimensions: int
    dtype: torch.dtype
    device: torch.device
    metric: str
    talk: RankTalk = ALONE
    bounds: tuple[int, ...] | None = None  # of each process's rows, among those of all

    def share(self, talk: RankTalk) -> None:
        """These are one process's rows; those of the others come before and after them, in the order of ranks."""
        if talk.size > 1:
            counts = talk.gather(torch.tensor([self.rows]))
            self.talk, self.bounds = talk, (0, *counts.cumsum(dim=0).tolist())

    @property
    def first_row(self) -> int:
        """The number of the first row here, among those of all processes."""
        return self.bounds[self.talk.rank] if self.bounds else 0

    @property
    def total_rows(self) -> int:
        """Of all processes."""
        return self.bounds[-1] if self.bounds else self.rows

    @property
    def prepared_dtype(self) -> torch.dtype:
        """Of the blocks."""
        return torch.float32 if self.metric == "cosine" else self.dtype

    def raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and they as they are."""
        raise NotImplementedError

    def raw_take(self, rows: Tensor) -> Tensor:
        """Rows by number: [M, D]."""
        raise NotImplementedError

    def like(self, result: Tensor) -> Any:
        """A result of the kind that the points came as."""
        return result.numpy()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Which rows, and they prepared: [b, D] float32 or half; asking for the next block may overwrite this one."""
        for own, block in self.raw_blocks():
            yield own, prepare(block, self.metric)

    def take(self, rows: Tensor) -> Tensor:
        """[M, D] float32, prepared: rows by their number among those of all processes, which all ask for the same."""
        if self.bounds is None:
            return self.take_own(rows)
        first, owner = self.first_row, torch.bucketize(rows, rows.new_tensor(self.bounds[1:]), right=True)
        own = self.take_own(rows[owner == self.talk.rank] - first)
        result = torch.empty(len(rows), self.dimensions, device=self.device)
        result[owner.argsort(stable=True)] = self.talk.gather(own)
        return result

    def take_own(self, rows: Tensor) -> Tensor:
        """The same of rows here, by their number among these."""
        return prepare(self.raw_take(rows), self.metric).float()

    def check(self, name: str = "points", keys: Sequence[str] | None = None) -> float:
        """The largest absolute coordinate, of prepared rows. InputError for rows that cannot be clustered.

        Those hold NaN or infinity, or, with "cosine", nothing but zeros. The error names them by ``keys``.
        """
        largest = 1.0 if self.metric == "cosine" else 0.0
        infinite, zero = [], []
        for own, block in self.raw_blocks():
            block = block.float() if block.dtype == torch.float64 else block
            if len(block) == 0:
                continue
            reach = max(abs(float(extreme)) for extreme in block.aminmax())
            if not math.isfinite(reach):
                infinite.append((~block.isfinite()).any(dim=1).nonzero().flatten() + own.start)
            elif self.metric == "cosine":
                zero.append((block == 0).all(dim=1).nonzero().flatten() + own.start)
            else:
                largest = max(largest, reach)
        for bad, why in ((infinite, "NaN or infinity"), (zero, "length 0, so no direction")):
            refuse_rows(name, torch.cat(bad).tolist() if bad else [], self.rows, why, keys)
        return self.talk.max(largest)


class HeldPoints(Points):
    """Rows in memory."""

    def __init__(self, data: Tensor, metric: str, kind: Any) -> None:
        self.data = data.float() if data.dtype == torch.float64 else data
        (self.rows, self.dimensions), self.dtype, self.device = data.shape, self.data.dtype, data.device
        self.metric, self.kind = metric, kind
        self.scaled: Tensor | None = None

    def raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.rows), self.data

    def raw_take(self, rows: Tensor) -> Tensor:
        return self.data[rows.to(self.device)]

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.scaled is None:  # once, not every round
            self.scaled = prepare(self.data, self.metric)
        yield slice(0, self.rows), self.scaled

    def like(self, result: Tensor) -> Any:
        if isinstance(self.kind, Tensor):
            return result
        if isinstance(self.kind, (np.ndarray, list)):
            return result.numpy()
        return import_module(type(self.kind).__module__.partition(".")[0]).from_dlpack(result)


class StreamedPoints(Points):
    """Rows in files, read by blocks, the next one while one is worked on."""

    device = torch.device("cpu")

    def __init__(self, parts: Sequence[Part], metric: str, memory: int) -> None:
        widths = {part.array.shape[1] for part in parts}
        if len(widths) != 1:
            found = " and ".join(f"[n, {width}]" for width in sorted(widths)) or "none"
            raise InputError(f"k-means: expected arrays of equal width, got {found}")
        self.parts, self.metric, self.memory = list(parts), metric, memory
        dtypes = (part.array.dtype.newbyteorder("=") for part in parts)
        self.dimensions, self.numpy_dtype = widths.pop(), np.result_type(*dtypes)
        self.dtype = torch.float16 if self.numpy_dtype == np.float16 else torch.float32
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.rows = int(self.starts[-1])
        self.bytes = self.rows * self.dimensions * self.numpy_dtype.itemsize
        self._room: list[np.ndarray] | None = None

    def held(self) -> HeldPoints:
        """The same rows in memory."""
        room = np.empty((self.rows, self.dimensions), self.numpy_dtype)
        return HeldPoints(torch.from_numpy(self._read(0, self.rows, room)), self.metric, self.parts)

    def raw_blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, self.memory // (2 * self.dimensions * self.numpy_dtype.itemsize))
        bounds = [(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]
        # Two blocks, read into by turns, and kept for the next round: fresh memory costs as much as reading into it.
        room, self._room = self._room, None
        if room is None:
            room = [np.empty((min(size, self.rows), self.dimensions), self.numpy_dtype) for _ in bounds[:2]]
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, *bounds[0], room[0]) if bounds else None
            for i, (start, stop) in enumerate(bounds):
                block = ahead.result()
                if i + 1 < len(bounds):
                    ahead = reader.submit(self._read, *bounds[i + 1], room[(i + 1) % 2])
                yield slice(start, stop), torch.from_numpy(block)
        self._room = room

    def raw_take(self, rows: Tensor) -> Tensor:
        wanted = rows.numpy()
        result = np.empty((len(wanted), self.dimensions), self.numpy_dtype)
        owner = np.searchsorted(self.starts, wanted, side="right") - 1
        for i in np.unique(owner):
            own = owner == i
            result[own] = self.parts[i].take(wanted[own] - self.starts[i])
        return torch.from_numpy(result)

    def _read(self, start: int, stop: int, room: np.ndarray) -> np.ndarray:
        """The rows, in the first ones of ``room``."""
        block = room[: stop - start]
        for part, first in zip(self.parts, self.starts, strict=False):
            low, high = max(start, first), min(stop, first + len(part))
            if low < high:
                part.read_into(block[low - start : high - start], int(low - first))
        return block


def prepare(block: Tensor, metric: str) -> Tensor:
    """float64 is rounded to float32; with "cosine" rows are scaled to length 1, in float32."""
    if block.dtype == torch.float64:
        block = block.float()
    if metric == "cosine":
        # The largest entry is divided out first: the squares of tiny vectors would vanish.
        block = block.float()
        block = block / block.abs().amax(dim=1, keepdim=True)
        block /= torch.linalg.vector_norm(block, dim=1, keepdim=True)
    return block


def refuse_rows(name: str, rows: Sequence[int], total: int, why: str, keys: Sequence[str] | None = None) -> None:
    """InputError that names the rows, if there are any."""
    if rows:
        shown = ", ".join(repr(str(keys[row])) if keys is not None else str(row) for row in rows[:SHOWN])
        shown += ", ..." if len(rows) > SHOWN else ""
        what = "rows" if keys is None else "keys"
        raise InputError(f"k-means: {len(rows)} of {total} {name} have {why}: {what} {shown}; leave them out")


def _open_part(name: str, part: Any) -> Part:
    if isinstance(part, Part):
        return part
    if isinstance(part, (str, os.PathLike)):
        try:
            part = RowFile(part)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{part}: not a readable .npy file ({error})") from error
    if not isinstance(part, (np.ndarray, RowFile)):
        raise InputError(
            f"k-means: expected a torch tensor, a NumPy or DLPack array, or a list of arrays and .npy paths, got a "
            f"list of {type(part).__name__}"
        )
    _checked(name, as_tensor(name, np.empty((0, *part.shape[1:]), part.dtype)), shape=part.shape)
    _refuse_mask(name, part)
    return Part(part)


def _read(array: np.ndarray | RowFile, start: int, target: np.ndarray) -> None:
    """Rows of an array into ``target`` [n, D]; those of a file that is mapped whole come by reading it, which leaves no
    mapped page behind."""
    if isinstance(array, RowFile):
        array.read_into(target, start)
        return
    whole = isinstance(array, np.memmap) and array.flags["C_CONTIGUOUS"] and not isinstance(array.base, np.memmap)
    if whole and array.filename is not None:
        read_rows(array.filename, array.offset, array.dtype, target, start)
    else:
        target[:] = array[start : start + len(target)]


def _checked(name: str, data: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    if data.dim() != 2 or data.shape[1] == 0 or data.dtype not in FLOATING:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATING)
        raise InputError(
            f"k-means: expected {name} [N, D] of a floating dtype ({dtypes}), got {list(shape or data.shape)} "
            f"{data.dtype}"
        )
    return data


def as_tensor(name: str, array: Any) -> Tensor:
    """A tensor, or an array of NumPy or with DLPack, as a dense tensor; it is not copied where torch can read it."""
    if isinstance(array, np.ndarray):
        _refuse_mask(name, array)
        try:
            return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
        except TypeError as error:
            raise InputError(f"k-means: expected {name} of a dtype that torch has, got {array.dtype}") from error
    if not isinstance(array, Tensor):
        if not hasattr(array, "__dlpack__"):
            raise InputError(
                f"k-means: expected {name} as a torch tensor, a NumPy or DLPack array, or a list of arrays and .npy "
                f"paths, got {type(array).__name__}"
            )
        try:
            array = torch.from_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"k-means: {name}: not readable as a DLPack array ({error})") from error
    if array.layout != torch.strided or array.is_nested or array.is_meta:
        kind = "a meta tensor" if array.is_meta else "a nested tensor" if array.is_nested else array.layout
        raise InputError(f"k-means: expected {name} as a dense tensor, got {kind}")
    return array.detach()


def _refuse_mask(name: str, array: np.ndarray) -> None:
    if np.ma.is_masked(array):
        count = int(np.ma.getmaskarray(array).sum())
        raise InputError(f"k-means: expected {name} without a mask, got {count} masked values; leave their rows out")

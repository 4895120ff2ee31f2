"""Tiles of matrices: by Hopper's copy engine where memory is laid out for it, else by masked pointers."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffprune.kernels.triton import Gpu

MAX_ROWS = 2**31 - 2**10
"""Row numbers are int32 in kernels, those of tiles that reach over the end included."""


@triton.jit
def load(
    source,  # [rows, columns]: a pointer, or a descriptor if DESCRIBED
    row,
    column,
    rows,
    columns,
    stride,  # between rows; 1 between columns
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """The [ROWS, COLUMNS] elements from (row, column), zeros outside of the matrix.

    ``rows`` and ``columns`` may name an earlier end than the matrix has; a descriptor only knows the matrix's own.
    """
    if DESCRIBED:
        tile = source.load([row, column])
    else:
        r = row + tl.arange(0, ROWS)
        c = column + tl.arange(0, COLUMNS)
        places = source + r.to(tl.int64)[:, None] * stride + c[None, :]
        tile = tl.load(places, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)
    return tile


def matrix(tensor: Tensor) -> Tensor:
    """[..., columns] as [rows, columns] with consecutive columns: a view if memory allows it, else a copy."""
    rows = tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def refuse_rows(tensor: Tensor) -> str | None:
    """The reason to refuse, if ``matrix(tensor)`` has more rows than kernels can number."""
    rows = tensor.shape[:-1].numel()
    return f"needs at most {MAX_ROWS} rows in all, got {rows}" if rows > MAX_ROWS else None


def describable(gpu: Gpu, *matrices: Tensor) -> bool:
    """Whether the copy engine (compute capability 9 on) can read all of these matrices: 16-byte rows and starts."""
    return gpu.capability >= 90 and all(
        m.numel() > 0 and m.data_ptr() % 16 == 0 and m.stride(0) > 0 and m.stride(0) * m.element_size() % 16 == 0
        for m in matrices
    )


def source(matrix: Tensor, block: tuple[int, int], described: bool) -> Tensor | TensorDescriptor:
    """What ``load`` reads tiles of shape ``block`` from."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if described else matrix


RATE = {256: 1.0, 128: 0.85, 64: 0.6}
"""Height of a tile -> rate at which it is worked off, relative to the tallest: estimates, never measured."""


class Tile(NamedTuple):
    """How a product is tiled: [rows, columns] per program, ``step`` of its depth at a time."""

    rows: int
    columns: int
    step: int
    options: dict[str, int]
    """Warps and pipeline stages, for the launch."""


def exact_tile(gpu: Gpu) -> Tile | None:
    """The tile of float32 products where a larger one would be rounded: on sm_100; else None.

    For sm_100 Triton 3.6 makes TF32 products of float32 that were 16-bit elements before, whatever ``input_precision``
    says, if the tile suits tensor memory: from 64 rows on.
    """
    return Tile(32, 64, 16, {"num_warps": 4, "num_stages": 2}) if gpu.capability >= 100 else None


def product_tile(rows: int, columns: int, depth: int, gpu: Gpu, batch: int = 1) -> Tile:
    """The tile for ``batch`` products [rows, columns] of 16-bit elements on tensor cores.

    256 × 128 needs least of the L2 cache: a step of 64 moves 48 KiB for 4.2 MFLOP. With 8 warps its float32 sums take
    128 of a thread's 255 registers, and four stages take 192 of an H100's 227 KiB of shared memory, so one program runs
    per multiprocessor. Of 128 × 128 with three stages two run side by side. The height is the one that ends first, if
    each round of tiles over the multiprocessors takes its height over its RATE. Before Hopper, loads and operands take
    registers too: 128 × 128 at most, and a step of 32.
    """
    hopper = gpu.capability >= 90
    width, step = power_of_2(columns, 16, 128), power_of_2(depth, 16, 64 if hopper else 32)

    def time(height: int) -> float:
        tiles = batch * triton.cdiv(rows, height) * triton.cdiv(columns, width)
        return triton.cdiv(tiles, gpu.processors) * height / RATE[height]

    height = min((256, 128, 64) if hopper else (128, 64), key=time)
    warps = 8 if height == 256 or (height * width >= 64 * 128 and not hopper) else 4
    stages = min(3 if hopper and height < 256 else 4, (gpu.shared - 4096) // ((height + width) * step * 2))
    return Tile(height, width, step, {"num_warps": warps, "num_stages": stages})


def multiplied_bytes(*matrices: Tensor) -> int:
    """Bytes of the elements that a product of these multiplies: those of different dtypes become float32."""
    return matrices[0].element_size() if len({m.dtype for m in matrices}) == 1 else 4


def power_of_2(size: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``size``, within [least, most], which are powers of two."""
    return min(most, max(least, triton.next_power_of_2(max(1, size))))

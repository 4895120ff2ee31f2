"""``linear_grad_dot`` on tensor cores: a matrix product whose tiles are multiplied and summed in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from diffprune.kernels.cuda import DTYPES, HALF, address, refuse_inputs, rows_of_16_bytes, where


def refuse(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> str | None:
    """Only CUDA tensors, all float16 or all bfloat16; a bias direction of any dtype but float64.

    Rounding float32 to TF32 would not be the answer for the values given.
    """
    bias_dtypes = (*HALF, torch.float32)
    return refuse_inputs(input, grad_output, direction, dtypes=HALF, same=True) or refuse_inputs(
        bias_direction, dtypes=bias_dtypes
    )


def run(input: Tensor, grad_output: Tensor, direction: Tensor, bias_direction: Tensor | None) -> Tensor:
    """See ``kernels/linear_grad_dot.py``. Products and sums in float32, the last sum in float64.

    Σ(G·M)∘A where the outputs are more than the inputs and there is no bias, else Σ(A·Mᵀ + 1·mᵀ)∘G: the second factor
    is read once more, so it is the narrower one. Inputs that are not multiples of 8 wide are copied.
    """
    samples, tokens = input.shape[:2]
    dot = torch.empty(samples, dtype=torch.float32, device=input.device)
    if samples == 0 or tokens == 0:
        return dot.zero_()
    transposed = bias_direction is None and grad_output.shape[2] > input.shape[2]
    x, y = (grad_output, input) if transposed else (input, grad_output)
    x, y = rows_of_16_bytes(x), rows_of_16_bytes(y)
    depth, columns = x.shape[2], y.shape[2]
    w = rows_of_16_bytes(_with_rows(direction, depth if transposed else columns))
    bias = None if bias_direction is None else _with_rows(bias_direction.float(), columns).contiguous()
    with where(x) as (extension, here):
        size = extension.linear_grad_dot_partials(here, samples, tokens, columns)
        partials = torch.empty(size, dtype=torch.float32, device=x.device)
        arrays = map(address, (x, w, y, bias, partials, dot))
        extension.linear_grad_dot(here, DTYPES[x.dtype], *arrays, samples, tokens, depth, columns, transposed)
    return dot


def _with_rows(matrix: Tensor, rows: int) -> Tensor:
    """With rows of zeros after its own."""
    missing = rows - matrix.shape[0]
    return torch.cat([matrix, matrix.new_zeros(missing, *matrix.shape[1:])]) if missing else matrix

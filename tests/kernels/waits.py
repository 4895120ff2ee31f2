"""How tests count what would make the host wait for a GPU, on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from diffprune.kernels.registration import registered

READS = {
    "aten::_local_scalar_dense",  # item(), int(), float(), bool(), tolist()
    "aten::bincount",
    "aten::equal",
    "aten::item",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""What needs a value of its input, or the size of its output, on the host; indexing by a mask too."""


class Waits(TorchDispatchMode):
    """Keeps the names of such operations, those inside the ops of this package too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or masked:
            self.found.append(name)
        if name in registered:  # the op's own code, which would run with this mode switched off
            with self:
                return registered[name].function(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[list[str]]:
    """The names, as they come. What Triton's interpreter does itself does not count: there is none on a GPU."""
    from triton.runtime.interpreter import GridExecutor

    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **options: Any) -> None:
        with _disable_current_modes():
            call(self, *args, **options)

    mode = Waits()
    with patch.object(GridExecutor, "__call__", launch), mode:
        yield mode.found

"""Without a GPU, Triton kernels run in Triton's interpreter: they read this variable when they are imported."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import torch


def mend_interpreter() -> None:
    """Triton 3.6's interpreter needs an older NumPy than its compiler does.

    NumPy 2.5 makes no int of an array of one element, and since 2.0 none makes -1 an unsigned integer.
    """
    from triton.runtime import interpreter

    patch_tensor, builder = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder
    all_ones = builder.get_all_ones_value

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def get_all_ones_value(self: Any, type: Any) -> Any:
        if not type.scalar.is_int_unsigned():
            return all_ones(self, type)
        dtype = interpreter._get_np_dtype(type)
        return interpreter.TensorHandle(interpreter.np.full(1, interpreter.np.iinfo(dtype).max, dtype), type.scalar)

    interpreter._patch_lang_tensor, builder.get_all_ones_value = patch, get_all_ones_value


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if version("triton").startswith("3.6."):
        mend_interpreter()
